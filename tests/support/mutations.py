"""Seeded mutations of valid files, and forked workers with limits that try a reader on every one of them.

A `Reader` makes valid files in a folder and says what one attempt to read them came to. `attack` mutates a
file, asks for an attempt in a forked worker, and counts outcomes: `same` (the meaning that an independent
reader gives) and `refused` (one named exception, one line) are allowed; `different`, `traceback`, `hang`,
`memory` and `died` are faults, told with the seed that repeats them.
"""

import collections
import dataclasses
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import stat
import struct
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ALLOWED = ("same", "refused")
FAULTS = ("different", "traceback", "hang", "memory", "died")
SECONDS, MEMORY = 10, 1 << 30  # of one attempt
COUNT = int(os.environ.get("MUTATIONS", 2000))  # of every reader: 20000 on demand
HUGE = [0, 1, -1, 2, 127, 255, 256, 65535, 2**31 - 1, -(2**31), 2**31, 2**32, 2**53, 2**63 - 1, -(2**63)]


class Difference(AssertionError):
    """A file was read as something else than it says, or refused in a way that helps nobody."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """What is attacked."""

    name: str
    prepare: Callable[[Path], Any]
    # writes valid files into an empty folder; what it returns is handed to `attempt`
    attempt: Callable[[Path, Any], str]
    # reads the folder: "same" or "refused"; raises Difference, and whatever else the reader lets through
    mutations: dict
    # {name: (bytes, random.Random) -> bytes} of one file's content
    targets: str = "*"
    # glob of the files that are mutated
    files: bool = True
    # whether files are also taken away, or replaced by folders and links


def require_line(fault, *names):
    """Holds a refusal to the house rule: one line that names the file and a cure. Returns "refused"."""
    text = str(fault)
    if "\n" in text or not text.strip():
        raise Difference(f"not one line: {text!r}")
    if not any(str(name) in text for name in names):
        raise Difference(f"names none of {names}: {text}")
    if not re.search(r"[;:,(] ?[a-z]", text):
        raise Difference(f"names no cure: {text}")
    return "refused"


# bytes


def _place(raw, rng):
    """A position in raw, half of the time near its beginning, where headers are."""
    return rng.randrange(min(len(raw), 64) if rng.random() < 0.5 else len(raw))


def _span(raw, rng):
    begin = _place(raw, rng)
    return begin, min(len(raw), begin + rng.choice([1, 2, 4, 8, 16, 64, 4096]))


def flip(raw, rng):
    at = _place(raw, rng)
    return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]


def insert(raw, rng):
    at = _place(raw, rng)
    return raw[:at] + rng.randbytes(rng.choice([1, 2, 8, 100])) + raw[at:]


def delete(raw, rng):
    begin, end = _span(raw, rng)
    return raw[:begin] + raw[end:]


def truncate(raw, rng):
    return raw[: rng.choice([0, 1, len(raw) - 1, rng.randrange(len(raw))])]


def duplicate(raw, rng):
    begin, end = _span(raw, rng)
    return raw[:end] + raw[begin:end] + raw[end:]


def swap(raw, rng):
    (a, b), (c, d) = sorted([_span(raw, rng), _span(raw, rng)])
    if c < b:
        return raw[:a] + raw[a:b][::-1] + raw[b:]
    return raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def number(raw, rng):
    """A binary field of 1, 4 or 8 bytes overwritten by an extreme number."""
    at, width = _place(raw, rng), rng.choice([1, 4, 8])
    value = rng.choice(HUGE) & ((1 << 8 * width) - 1)
    return raw[:at] + struct.pack("<Q", value)[:width] + raw[at + width :]


def grow(raw, rng):
    return raw + rng.choice([b"\0", b"\n", rng.randbytes(8), bytes(4096), raw[-12:], raw])


BYTES = {
    "flip": flip,
    "insert": insert,
    "delete": delete,
    "truncate": truncate,
    "duplicate": duplicate,
    "swap": swap,
    "number": number,
    "grow": grow,
}


# text


def digits(raw, rng):
    """A written number replaced by an extreme one, or by one written in another way."""
    found = list(re.finditer(rb"\d+(\.\d+)?", raw))
    if not found:
        return flip(raw, rng)
    ways = [str(rng.choice(HUGE)), "9" * 400, "1e400", "-0", "1e1", "NaN", "inf", "0x10", "1_000", "08"]
    ways += ["1,5", "٤", "四", "½", "1.0", "1e-400", "true", '"1"', "", "1 000", "1'000", "2001-99-99"]
    one = rng.choice(found)
    return raw[: one.start()] + rng.choice(ways).encode() + raw[one.end() :]


def quotes(raw, rng):
    """Quotes, dashes and spaces of other languages and of word processors."""
    pairs = [('"', "“"), ('"', "«"), ("'", "’"), (" ", "\u00a0"), ("-", "–"), (",", ";"), (":", "："), (" ", "\t")]  # fmt: skip
    old, new = rng.choice(pairs)
    return raw.replace(old.encode(), new.encode(), rng.choice([1, -1]))


def encoding(raw, rng):
    text = raw.decode("utf-8", "replace")
    names = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp037"]
    return text.encode(rng.choice(names), "replace")


def line_ends(raw, rng):
    return raw.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", "\u2028".encode(), b"\x0b"]))


def lines(raw, rng):
    """One line doubled, dropped, moved, indented or emptied."""
    parts = raw.splitlines(keepends=True) or [raw]
    at = rng.randrange(len(parts))
    way = rng.randrange(5)
    if way == 0:
        parts.insert(rng.randrange(len(parts) + 1), parts[at])
    elif way == 1:
        parts.pop(at)
    elif way == 2:
        parts.insert(rng.randrange(len(parts)), parts.pop(at))
    elif way == 3:
        parts[at] = rng.choice([b" ", b"\t", b"#", b"- "]) + parts[at]
    else:
        parts[at] = b"\n"
    return b"".join(parts)


def value(raw, rng):
    """What stands behind a colon, or between commas, replaced by something of another type."""
    found = list(re.finditer(rb"(?<=[:,])[^:,\n{}\[\]]+", raw))
    if not found:
        return flip(raw, rng)
    ways = ["null", "true", "{}", "[]", '""', "-1", "[1, 2]", "{a: 1}", "&a [*a]", "*a", "!!python/none", "~", "é"]  # fmt: skip
    one = rng.choice(found)
    return raw[: one.start()] + b" " + rng.choice(ways).encode() + raw[one.end() :]


TEXT = BYTES | {
    "digits": digits,
    "quotes": quotes,
    "encoding": encoding,
    "line ends": line_ends,
    "lines": lines,
    "value": value,
}


# files


def _as_folder(path, rng):
    path.unlink()
    path.mkdir()


def _as_link(path, rng):
    """A link to another file of the folder, to nowhere, to itself, or to an endless device."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    target = rng.choice([*others[:3], "nowhere", path.name, "/dev/zero", "/dev/null"])
    path.unlink()
    path.symlink_to(target)


def _as_fifo(path, rng):
    path.unlink()
    os.mkfifo(path)


def _no_permission(path, rng):
    path.chmod(0)


FILES = {
    "missing": lambda path, rng: path.unlink(),
    "folder": _as_folder,
    "link": _as_link,
    "fifo": _as_fifo,
    "no permission": _no_permission,
}


def mutate(folder, reader, seed):
    """Change one file of `folder` as `seed` says; what was done, in words."""
    rng = random.Random(seed)
    path = rng.choice(sorted(p for p in folder.rglob(reader.targets) if p.is_file()))
    if reader.files and rng.random() < 0.03:
        name = rng.choice(sorted(FILES))
        FILES[name](path, rng)
        return f"{name} of {path.name}"
    raw, names = path.read_bytes(), []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if raw:
            names.append(rng.choice(sorted(reader.mutations)))
            raw = reader.mutations[names[-1]](raw, rng)
    path.write_bytes(raw)
    return f"{' + '.join(names)} of {path.name}"


# workers


@dataclasses.dataclass
class Outcomes:
    """What an attack came to."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    # attempts by outcome
    faults: list = dataclasses.field(default_factory=list)
    # (seed, what was done, outcome, the last lines of what was raised) of each attempt that is not allowed
    kinds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    # attempts by (first mutation, outcome)

    def told(self, most=10):
        """The faults in words, for the message of a failed test."""
        shown = [f"seed {seed}, {done}: {how}\n{why}" for seed, done, how, why in self.faults[:most]]
        return f"{dict(self.counts)}\n" + "\n".join(shown)


class Late(BaseException):
    """Time has run out; no `except Exception` of a reader may catch it."""


def attack(reader, count=COUNT, first=0):
    """The Outcomes of `count` mutations with the seeds from `first` on."""
    found = Outcomes()
    with tempfile.TemporaryDirectory() as base:
        origin = Path(base, "origin")
        origin.mkdir()
        known = reader.prepare(origin)
        seed, end = first, first + count
        while seed < end:  # a worker that died is followed by another, from the next seed on
            seed = _worker(reader, origin, known, Path(base, "work"), range(seed, end), found)
    return found


def _worker(reader, origin, known, work, seeds, found):
    """Fork one worker for `seeds`; the first seed that is left to do."""
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks beside threads, which the child leaves alone
        child = os.fork()
    if child == 0:
        os.close(receiver)
        try:
            _attempts(reader, origin, known, work, seeds, sender)
        except BaseException:
            traceback.print_exc()  # of this module: the parent tells the seed as "died"
        finally:
            os._exit(0)
    os.close(sender)
    seed, buffer = seeds.start, b""
    while select.select([receiver], [], [], 2 * SECONDS)[0]:
        piece = os.read(receiver, 1 << 16)
        if not piece:
            break
        buffer += piece
        *whole, buffer = buffer.split(b"\n")
        for line in whole:
            seed = _count(found, *json.loads(line)) + 1
    else:
        os.kill(child, signal.SIGKILL)
    os.close(receiver)
    _, status = os.waitpid(child, 0)
    if seed < seeds.stop:
        how = "hang" if status == signal.SIGKILL else "died"
        _count(found, seed, "unknown", how, f"status {status}")
        seed += 1
    return seed


def _count(found, seed, done, outcome, why):
    found.counts[outcome] += 1
    found.kinds[re.split(r" \+ | of ", done)[0], outcome] += 1
    if outcome not in ALLOWED:
        found.faults.append((seed, done, outcome, why))
    return seed


def _attempts(reader, origin, known, work, seeds, sender):
    """In the child: one line of JSON for every seed."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _late)
    warnings.simplefilter("ignore")
    for seed in seeds:
        restore(origin, work)
        done = mutate(work, reader, seed)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        outcome, why = attempt(reader, work, known)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(sender, json.dumps([seed, done, outcome, why]).encode() + b"\n")


def _late(number, frame):
    raise Late


def restore(origin, work):
    """`work` as `origin` is, whatever an attempt left there."""
    for path in work.rglob("*") if work.exists() else ():
        if not path.is_symlink() and stat.S_ISREG(path.lstat().st_mode):
            path.chmod(0o600)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(origin, work)


def attempt(reader, folder, known):
    """(outcome, last lines of what was raised) of one attempt."""
    try:
        return reader.attempt(folder, known), ""
    except Late:
        return "hang", traceback.format_exc()[-600:]
    except MemoryError:
        return "memory", traceback.format_exc()[-600:]
    except Difference as fault:
        return "different", str(fault)[:600]
    except BaseException:
        return "traceback", traceback.format_exc()[-1200:]


def attempt_seed(reader, seed, folder):
    """Repeat one attempt in this process, for a person who looks into a fault: (what was done, outcome, why)."""
    origin, work = Path(folder, "origin"), Path(folder, "work")
    origin.mkdir(parents=True)
    known = reader.prepare(origin)
    restore(origin, work)
    done = mutate(work, reader, seed)
    return done, *attempt(reader, work, known)
