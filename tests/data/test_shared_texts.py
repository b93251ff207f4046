"""The same text reached twice, by whatever road: refused at its line; distinct texts of one file are not."""

import os
import shutil

import indexed_files
import numpy as np
import pytest

from megatron_commute.config import ConfigError, load
from megatron_commute.data.index_file import meet
from megatron_commute.data.indexed import inspect_data

SEQ = 8


@pytest.fixture
def told(tmp_path):
    """told(domains): what inspect_data says of a mixture file in a folder with data A, B and C, "" where it passes."""
    rng = np.random.default_rng(0)
    for name in "ABC":
        indexed_files.write(tmp_path / name, rng.integers(99, size=SEQ * 2000 + 1))

    def ask(domains):
        file = tmp_path / "m.yaml"
        file.write_text(f"domains:\n{domains}\n")
        try:
            inspect_data(load(file), SEQ)
        except ConfigError as error:
            assert "\n" not in str(error)
            return str(error).replace(f"{tmp_path}/", "")
        return ""

    return ask


ONE = "  a: {path: A, holdout: B}"


def test_a_holdout_that_another_domain_trains_on(told):
    said = "m.yaml:2: domains.a.holdout: B is trained on as well, by domain b; name a prefix of its own"
    assert told(f"{ONE}\n  b: {{path: B}}") == said
    assert "m.yaml:3: domains.a.holdout: is trained on as well" in told(f"  b: {{path: B}}\n{ONE}")
    assert told(f"{ONE}\n  b: {{path: [C, B]}}") == said
    assert told(f"{ONE}\n  c: {{path: C, holdout: B}}") == "", "two domains may be measured on one text"


def link(tmp_path, way):
    """D, another road to the text of B."""
    for end in ("bin", "idx"):
        one, other = tmp_path / f"B.{end}", tmp_path / f"D.{end}"
        if way == "symlink":
            other.symlink_to(one.name)
        elif way == "hard link":
            os.link(one, other)
        elif way == "copy":
            shutil.copy(one, other)
        elif end == "bin":  # another index of the same file: its second half first
            other.symlink_to(one)
        else:
            indexed_files.write_index(tmp_path / "D", 8, [8000, 8001], [16002, 0])
    return "D"


@pytest.mark.parametrize("way", ["symlink", "hard link", "copy", "view"])
def test_a_holdout_by_another_name(told, tmp_path, way):
    name = link(tmp_path, way)
    said = f"domains.a.holdout: B is trained on as well, by domain b as {name}; name a prefix of its own"
    for domains in (f"{ONE}\n  b: {{path: {name}}}", f"  b: {{path: {name}}}\n{ONE}"):
        assert said in told(domains)
    assert "domains.a.holdout: D is trained on" in told("  a: {path: B, holdout: D}")


def test_folders_by_another_name(told, tmp_path):
    (tmp_path / "there").symlink_to(tmp_path)
    for other in ("there/B", f"{tmp_path}/B", "./there/../B", "there/there/B"):
        assert "is trained on as well" in told(f"{ONE}\n  b: {{path: {other}}}"), other
    both = told("  a: {path: A}\n  b: {path: [C, there/A]}")
    assert both == "m.yaml:3: domains.b.path: there/A has text that domain a reads as A; name every text once"
    assert "domain a reads as A" in told("  a: {path: [A, there/A]}")


def test_distinct_texts_of_one_file_are_distinct_data(told, tmp_path):
    for name, lengths, pointers in (("T", [4001, 4001], [0, 16004]), ("V", [4001], [8002])):
        (tmp_path / f"{name}.bin").symlink_to(tmp_path / "B.bin")
        indexed_files.write_index(tmp_path / name, 8, lengths, pointers)
    assert told("  a: {path: T, holdout: V}\n  b: {path: A}") == ""
    indexed_files.write_index(tmp_path / "V", 8, [4001], [8000])  # one token of the training text
    assert "V is trained on as well, by domain a as T" in told("  a: {path: T, holdout: V}\n  b: {path: A}")


def test_a_holdout_that_comes_off_the_end_of_repeated_texts(told, tmp_path):
    (tmp_path / "R.bin").symlink_to(tmp_path / "B.bin")
    indexed_files.write_index(tmp_path / "R", 8, [16001, 2057], [0, 0])
    said = "domains.a.holdout: its last 256 sequences repeat text of the others; name a prefix of its own"
    assert said in told("  a: {path: R}")
    assert told("  a: {path: R, holdout: A}") == "", "texts may be repeated in training"
    indexed_files.write_index(tmp_path / "R", 8, [12001, 12001, 2057], [0, 0, 24002])
    assert told("  a: {path: R}") == "", "and where the holdout has none of them"


def test_ranges_meet_as_sets_of_bytes_do():
    rng = np.random.default_rng(1)
    for _ in range(500):
        lists = []
        for _ in range(2):
            begins = np.sort(rng.integers(0, 60, rng.integers(0, 5)))
            lists.append(np.stack([begins, begins + rng.integers(1, 9, len(begins))], axis=1))
        one, other = ({b for begin, end in ranges for b in range(begin, end)} for ranges in lists)
        assert meet(*lists) == bool(one & other)
