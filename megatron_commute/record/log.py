"""The decision log: one JSON line per event, appended by one rank, survived by readers when
torn.

The checkpoint stores the number of lines written before it; on resume `rewind` moves later lines
aside, so that the record of an interrupted and resumed run equals that of an uninterrupted one
(but for the `timing` objects).
"""

import json
import os
import pathlib

SCHEMA = 1
NAME = "commute.jsonl"


def _plain(value):
    """JSON form of numpy and torch values; non-finite numbers become null, which JSON can carry."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def line(event, fields):
    """A line of a record as a dict of JSON values."""
    return {"schema": SCHEMA, "event": event, **_plain(fields)}


class Record:
    """An open decision log. `lines` and `size` (bytes) count whole lines on disk; what lies
    beyond them is torn.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.lines = self.size = 0

    def start_fresh(self):
        """Begin an empty record; one that is already there is moved aside, never deleted."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.replace(self.path, _free_name(self.path))
        self.lines = self.size = 0

    def rewind(self, lines):
        """Keep the first `lines` lines and move the rest to RECORD.discarded-N.

        Raises ValueError when the record on disk is shorter than the checkpoint says.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        kept = content.split(b"\n")[:lines]
        whole = content.count(b"\n")
        if whole < lines:
            raise ValueError(
                f"{self.path}: has {whole} lines, the checkpoint was written after {lines}; put the record "
                "of this run back beside its checkpoints, or start a fresh run in another --save folder"
            )
        head = b"".join(line + b"\n" for line in kept)
        if len(head) < len(content):
            replace(_free_name(self.path), content[len(head) :])
            replace(self.path, head)
        self.lines, self.size = lines, len(head)

    def append(self, event, **fields):
        """Write one line and flush it to disk; a torn line left by an earlier failure is
        overwritten. Raises OSError.
        """
        text = json.dumps(line(event, fields), allow_nan=False).encode() + b"\n"
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            end = min(self.size, file.seek(0, os.SEEK_END))  # a file that somebody has cut gets no hole
            file.seek(end)
            file.truncate()
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines, self.size = self.lines + 1, end + len(text)


def _free_name(path):
    n = 1
    while (name := path.with_name(f"{path.name}.discarded-{n}")).exists():
        n += 1
    return name


def replace(path, content):
    """Write `content`, bytes, as the whole of a file: whoever reads it sees the old one or this
    one.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def find(run):
    """The record file of `run`: a record itself, or the folder that holds one. FileNotFoundError
    names what was tried.
    """
    path = pathlib.Path(run)
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no decision log here; name a folder written with --save, or a {NAME}"
        )
    return file


def read(run):
    """All lines of a record as dicts. A torn last line is left out.

    Raises ValueError naming file and line where a line before the last is damaged or has an
    unknown schema.
    """
    file = find(run)
    lines = file.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(
                f"{file}:{number}: not a JSON line; restore the file or cut it before this line"
            ) from None
        if event.get("schema") != SCHEMA:
            raise ValueError(
                f"{file}:{number}: schema {event.get('schema')!r} is not {SCHEMA}; read it with the version "
                "that wrote it"
            )
        events.append(event)
    return events
