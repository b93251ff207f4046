"""A control file under attack: whatever stands in its place, a look at it ends soon, tells it once, and no run ends."""

import os
import random
import signal

import pytest
from flow_jobs import MIXTURE, NAMES, attached, trained, write_data

from megatron_commute.decide import control_file as control
from megatron_commute.record import log as record
from megatron_commute.settings.batches import Batches

HERE = control.Limits(names=NAMES, feeds=True, samples=1000, seq_length=8, batches=Batches(8))
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TEXTS = {
    "a list as key": "? [a, b]\n: 2\n",
    "a mapping as key": "{{a: 1}: 2}: 3\n",
    "no date": "freeze: 2001-99-99\n",
    "a date": "from: 2001-01-01\n",
    "inside itself": "weights: &w {en: *w}\n",
    "inside itself, as a list": "&a [*a]\n",
    "1500 brackets": "freeze: " + "[" * 1500,
    "30000 brackets": "[" * 30000 + "]" * 30000,
    "lists in lists": "- " * 30000,
    "keys in keys": "? " * 30000,
    "400 digits": "from: " + "9" * 400 + "\n",
    "6000 digits": "from: " + "9" * 6000 + "\n",
    "400 digits of a share": "weights: {en: " + "9" * 400 + "}\n",
    "no number": "caps: .nan\n",
    "beyond all numbers": "strength: 1e999\n",
    "laughs": LAUGHS,
    "many keys": "".join(f"k{i}: 1\n" for i in range(6000)),
    "a merge of itself": "weights: &w\n  <<: *w\n",
    "tags": "freeze: !!python/object/apply:os.system ['true']\n",
    "binary": "freeze: !!binary nonsense\n",
    "an omap": "weights: !!omap [a]\n",
    "a set": "weights: !!set {en, ru}\n",
    "a long key": "x" * 60000 + ": 1\n",
    "lines in a key": '"a\\nb\\nc": 1\n',
    "two documents": "freeze: true\n---\nfreeze: false\n",
    "directives": "%YAML 9.9\n---\nfreeze: true\n",
    "keys that are numbers": "1: 2\n3.5: 4\nnull: 5\n",
    "shares by number": "weights: {1: 0.5, 2: 0.5}\n",
    "a schedule that waits": "schedule: pipe\n",
    "an endless schedule": "schedule: /dev/zero\n",
    "a schedule of nothing": 'schedule: "\\0"\n',
    "nothing": "",
    "one word": "freeze\n",
}  # fmt: skip


class Late(Exception):
    """A look took too long."""


@pytest.fixture
def soon():
    """Ends what would go on for ever: a pipe that is waited for, a parser that is quadratic."""

    def late(*_):
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def looked(path):
    """What two looks at a file tell."""
    watch = control.Watch(path, HERE)
    return watch.look(), watch.look()


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_told_in_one_line_once_and_soon(tmp_path, name, soon):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / control.NAME
    path.write_text(TEXTS[name])
    told, again = looked(path)
    assert isinstance(told, str) and "\n" not in told and len(told) <= control.LONGEST_WORD and again is None
    assert str(path) in told


def test_anything_that_is_no_small_regular_file_is_told_once(tmp_path, soon):
    path = tmp_path / control.NAME
    os.mkfifo(path)
    assert "is a pipe" in looked(path)[0]
    path.unlink()
    for target, words in (("/dev/zero", "is no regular file"), (tmp_path, "is a folder")):
        path.symlink_to(target)
        told, again = looked(path)
        assert words in told and again is None
        path.unlink()
    path.symlink_to(path)
    assert looked(path) == (None, None)  # leads nowhere
    path.unlink()
    path.write_text("# x\n" * 2_500_000)
    told, again = looked(path)
    assert "holds more than 64 KiB" in told and again is None
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF" in looked(path)[0]
    path.write_text("freeze: true\n" + "#" * 60000)
    assert looked(path)[0] == control.Control(freeze=True)


def test_a_pipe_that_is_written_to_is_told_once_for_all_its_versions(tmp_path, soon):
    path = tmp_path / control.NAME
    os.mkfifo(path)
    watch = control.Watch(path, HERE)
    assert "is a pipe" in watch.look()
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    for _ in range(3):
        os.write(end, b"freeze: true\n")
        assert watch.look() is None
    os.close(end)


def test_random_changes_of_a_valid_file_never_raise(tmp_path, soon):
    """Bytes, pieces and lines of a valid file changed at random; a version is followed or told in one line."""
    rng = random.Random(0)
    good = b"freeze: false\nweights: {en: 0.5, ru: 0.5}\nfrom: 64\ncaps: {en: 0.6}\nstrength: 0.5\ntarget: &t {ru: 1}\n"
    odd = [
        b"[",
        b"{",
        b"&t ",
        b"*t",
        b": ",
        b"- ",
        b"\0",
        b"\xff",
        b"!!int ",
        b"9" * 50,
        b"\r\n",
        b"? ",
        b"|",
        b"'",
        b"<<: *t",
    ]
    path = tmp_path / control.NAME
    watch = control.Watch(path, HERE)
    for _ in range(300):
        text = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 6)] = rng.choice(
                [rng.choice(odd), bytes([rng.randrange(256)]), text[: at // 2]]
            )
        path.write_bytes(text)
        watch._seen = None
        told = watch.look()
        assert told is None or isinstance(told, control.Control) or ("\n" not in told and len(told) <= 400)


def test_a_run_goes_on_under_every_attack_as_if_there_were_no_file(tmp_path):
    write_data(tmp_path)
    text = MIXTURE.replace("mode: fixed", "mode: act")
    plugin, _ = attached(tmp_path, text)
    attacks = [TEXTS[name] for name in ("a list as key", "no date", "inside itself", "400 digits", "laughs")]
    for step, attack in zip(range(0, 50, 10), attacks, strict=True):
        (tmp_path / "run" / control.NAME).write_text(attack)
        trained(plugin, step, step + 10)
    trained(plugin, 50)
    told = [line for line in record.read(tmp_path / "run") if line["event"] == "control"]
    assert [line["step"] for line in told] == [0, 10, 20, 30, 40] and all("error" in line for line in told)
    alone, _ = attached(tmp_path, text, place="alone")
    trained(alone)
    assert plugin.seen == alone.seen
