"""A record that begins in another folder says where the run came from; one that was brought along goes on."""

import numpy as np
import pytest
import ranks

from megatron_commute import reduce
from megatron_commute.adapters import branch

STATE = {"lines": 2, "mixture": {"index": 80}}


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/commute.jsonl").write_text("one\ntwo\nthree\n")
    return tmp_path / "a", tmp_path / "b"


def told(origin, here):
    return branch.sentence(here / "commute.jsonl", str(origin), STATE, reduce.Groups())


def test_a_new_folder_begins_with_where_it_came_from(folders):
    a, b = folders
    assert told(a, b) == f"branched at sample 80 from {a}, whose record has what came before"


def test_the_same_folder_by_another_name_goes_on(folders, tmp_path):
    a, _ = folders
    (tmp_path / "link").symlink_to(a)
    assert told(a, a) == told(a, tmp_path / "link") == ""


def test_a_record_that_was_brought_along_goes_on_and_another_run_s_does_not(folders):
    a, b = folders
    (b / "commute.jsonl").write_text("one\ntwo\nfour\nfive\n")
    assert told(a, b) == ""
    (b / "commute.jsonl").write_text("one\nother\nfour\nfive\n")
    assert told(a, b).startswith("branched ")
    (a / "commute.jsonl").unlink()
    assert told(a, b) == ""


def of_rank(rank, origin, here):
    return branch.sentence(f"{here}/commute.jsonl" if rank == 0 else "/nowhere", origin, STATE,
                           reduce.Groups(world=reduce.everyone()))  # fmt: skip


def test_rank_0_looks_for_all(folders):
    a, b = (str(folder) for folder in folders)
    assert len(set(ranks.run(of_rank, 2, a, a))) == 1 and ranks.run(of_rank, 2, a, b)[1].startswith(
        "branched"
    )
    assert np.unique(ranks.run(of_rank, 2, a, a)).tolist() == [""]
