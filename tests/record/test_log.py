"""The decision log: whole lines only, whatever tears them; rewinding; what JSON cannot say."""

import json

import numpy as np
import pytest
import torch

from megatron_commute.record import log as record
from megatron_commute.record.log import Record


@pytest.fixture
def log(tmp_path):
    opened = Record(tmp_path / "run" / record.NAME)
    opened.start_fresh()
    for step in range(3):
        opened.append("loss", step=step)
    return opened


def steps(path):
    return [line["step"] for line in record.read(path)]


def test_lines_are_json_with_schema_and_event(log):
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == [{"schema": 1, "event": "loss", "step": step} for step in range(3)]
    assert log.lines == 3 and log.size == log.path.stat().st_size
    assert record.read(log.path.parent) == record.read(log.path) == lines


def test_values_of_numpy_and_torch_are_plain_and_exact(log):
    third = np.array([1 / 3, 2 / 3])
    log.append("probe", P=np.array([[0, 1], [-1, 0]]), s=third, t=torch.tensor([0.5]), n=np.int64(7), names=("a", "ü"),
               flag=True, nothing=None, deep={"x": np.float64(0.1), 3: [third]})  # fmt: skip
    line = record.read(log.path)[-1]
    assert line["P"] == [[0, 1], [-1, 0]] and line["s"] == third.tolist() and line["t"] == [0.5]
    assert line["n"] == 7 and line["names"] == ["a", "ü"] and line["flag"] is True and line["nothing"] is None
    assert line["deep"] == {"x": 0.1, "3": [third.tolist()]}


def test_numbers_that_are_not_finite_become_null(log):
    log.append("probe", s=np.array([np.nan, 1.0, -np.inf]), x=float("inf"), M=[[float("nan")]])
    text = log.path.read_text().splitlines()[-1]
    assert json.loads(text, parse_constant=pytest.fail)["s"] == [None, 1.0, None]
    assert json.loads(text)["x"] is None and json.loads(text)["M"] == [[None]]


def test_a_torn_last_line_is_left_out_and_overwritten_by_the_next(log):
    whole = log.path.read_bytes()
    for torn in (b'{"schema": 1, "ev', b'{"schema": 1, "name": "\xd0', b"\0\0\0\0"):
        log.path.write_bytes(whole + torn)
        assert steps(log.path) == [0, 1, 2]
    log.path.write_bytes(
        whole + b'{"schema": 1, "event": "probe", "P": [' + b"0.5, " * 50
    )  # longer than the next line
    log.append("loss", step=3)
    assert steps(log.path) == [0, 1, 2, 3] and log.path.read_bytes().startswith(whole)
    assert log.size == log.path.stat().st_size


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"not json", r"commute\.jsonl:2: not a JSON line; restore the file or cut it"),
        (b"17", r"commute\.jsonl:2: not a JSON line"),
        (b'{"schema": 2, "event": "loss"}', r"commute\.jsonl:2: schema 2 is not 1; read it with the version"),
        (b'{"event": "loss"}', r"commute\.jsonl:2: schema null is not 1"),
    ],
)
def test_a_damaged_line_is_named(log, damage, message):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(lines[0] + damage + b"\n" + lines[2])
    with pytest.raises(ValueError, match=message):
        record.read(log.path)


def test_rewinding_moves_later_lines_aside_and_writing_goes_on(log):
    again = Record(log.path)
    again.rewind(3)
    assert not list(log.path.parent.glob("*.discarded-*")), "nothing comes later"
    again.rewind(2)
    assert steps(log.path) == [0, 1] and again.lines == 2 and again.size == log.path.stat().st_size
    assert steps(log.path.with_name("commute.jsonl.discarded-1")) == [2]
    again.append("loss", step=20)
    again.rewind(1)
    assert steps(log.path.with_name("commute.jsonl.discarded-2")) == [1, 20] and steps(log.path) == [0]
    assert steps(log.path.with_name("commute.jsonl.discarded-1")) == [2], "what was moved aside stays"


@pytest.mark.parametrize("content", [None, b"", b'{"schema": 1, "event": "loss", "step": 0}\n{"schema'])
def test_a_record_that_lacks_lines_is_refused_and_left_as_it_is(log, content):
    log.path.unlink() if content is None else log.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"has \d lines, the checkpoint was written after 3; put the record"):
        Record(log.path).rewind(3)
    assert (log.path.read_bytes() if log.path.exists() else None) == content


def test_a_fresh_start_moves_an_older_record_aside(log):
    old = log.path.read_bytes()
    fresh = Record(log.path)
    fresh.start_fresh()
    fresh.append("start")
    assert log.path.with_name("commute.jsonl.discarded-1").read_bytes() == old
    assert [line["event"] for line in record.read(log.path)] == ["start"]


def test_a_write_that_fails_half_way_leaves_no_half_line(log, monkeypatch):
    real, whole = open, log.path.read_bytes()

    class Full:
        """A file on a disk that takes ten more bytes."""

        def __init__(self, *args):
            self.file = real(*args)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line):
            self.file.write(line[:10])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr("builtins.open", Full)
    with pytest.raises(OSError, match="No space left"):
        log.append("loss", step=3)
    monkeypatch.undo()
    assert log.lines == 3 and log.path.read_bytes() == whole + b'{"schema":'
    assert steps(log.path) == [0, 1, 2]
    log.append("loss", step=4)
    assert steps(log.path) == [0, 1, 2, 4]


def garbage(lines):
    return [*lines[:1], b"garbage \xff", *lines[1:]]


CHANGED = {  # what a hand did to six lines, a checkpoint after four -> how many of the four are kept
    "a line doubled": (lambda lines: [*lines[:2], lines[1], *lines[2:]], 4),
    "garbage between": (garbage, 4),
    "other line ends": (lambda lines: [line + b"\r" for line in lines], 4),
    "old Mac line ends": (lambda lines: [b"\r".join(lines), b"", b"", b""], 4),
    "layout": (
        lambda lines: [json.dumps(json.loads(line), separators=(",", ":")).encode() for line in lines],
        4,
    ),
    "a line damaged": (lambda lines: [*lines[:1], lines[1][:-4], *lines[2:]], 3),
    "a number edited": (lambda lines: [*lines[:1], lines[1].replace(b"2.5", b"9.5"), *lines[2:]], 4),
}


@pytest.mark.parametrize("how", CHANGED)
def test_a_record_changed_by_another_hand_is_noticed_mended_and_kept_whole_beside(tmp_path, how):
    change, kept = CHANGED[how]
    log = Record(tmp_path / record.NAME)
    log.start_fresh()
    for step in range(6):
        if step == 4:
            digest = log.digest
        log.append("loss", step=step, sample=8 * step, loss=2.5)
    lines = log.path.read_bytes().splitlines()
    found = b"".join(line + b"\n" for line in change(lines))
    log.path.write_bytes(found)
    again = Record(log.path)
    told = again.rewind(4, digest, 24)
    assert (
        f"{kept} of its 4 lines are kept" in told
        and "lies in commute.jsonl.discarded-1" in told
        and "\n" not in told
    )
    assert log.path.with_name("commute.jsonl.discarded-1").read_bytes() == found
    left = [line["step"] for line in record.read(log.path)]
    assert left == ([0, 2, 3] if kept == 3 else [0, 1, 2, 3])
    again.append("loss", step=9)
    assert record.read(log.path)[-1]["step"] == 9 and again.lines == kept + 1
    same = Record(log.path)
    assert same.rewind(again.lines, again.digest, 80) == "" and same.digest == again.digest


def test_a_record_of_a_checkpoint_without_a_digest_is_read_line_by_line(log):
    lines = log.path.read_bytes().splitlines(keepends=True)
    assert Record(log.path).rewind(3) == ""
    log.path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    assert "2 of its 3 lines are kept" in Record(log.path).rewind(3)


@pytest.mark.parametrize(
    "text", ["", "garbage", "{}", "[1]", '{"step": "x"}', '{"step": 1.5}', "[" * 100_000]
)
def test_a_fault_file_that_says_nothing_is_refused_with_its_cure(tmp_path, text):
    path = tmp_path / "commute.fault"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"commute\.fault: does not say .*; write .*, or remove the file"):
        record.fault_step(path)
    path.write_text('{"step": 7}')  # the cure that the message prints
    assert record.fault_step(path) == 7
    path.unlink()
    assert record.fault_step(path) == -1
    path.mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        record.fault_step(path)


def test_a_new_record_never_follows_a_link(tmp_path):
    (tmp_path / record.NAME).symlink_to(tmp_path / "elsewhere")
    log = Record(tmp_path / record.NAME)
    log.start_fresh()
    log.append("start", step=0)
    assert not (tmp_path / "elsewhere").exists() and log.path.is_file() and not log.path.is_symlink()
