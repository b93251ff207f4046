"""The decision log: one JSON line per event, appended by one rank, survived by readers when
torn.

The checkpoint stores the number of lines written before it; on resume `rewind` moves later lines
aside, so that the record of an interrupted and resumed run equals that of an uninterrupted one
(but for the `timing` objects).
"""

import hashlib
import json
import os
import pathlib

from megatron_commute.record import shape
from megatron_commute.settings import text_files
from megatron_commute.settings.yaml_checks import shown

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
        self._holds(0, b"")

    def _holds(self, lines, content):
        self.lines, self.size, self._digest = lines, len(content), hashlib.sha256(content)

    @property
    def digest(self):
        """sha256 of the lines, of which a restart knows whether somebody has changed them."""
        return self._digest.hexdigest()

    def start_fresh(self):
        """Begin an empty record; one that is already there is moved aside, never deleted."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.path):
            os.replace(self.path, _free_name(self.path))
        self._holds(0, b"")

    def rewind(self, lines, digest=None, sample=None):
        """Keep the first `lines` lines and move the rest to RECORD.discarded-N.

        digest: of these lines when the checkpoint was written, at `sample`, None where it keeps
        none. Lines that somebody has changed since are mended as far as they can be; then the file
        as it was found is moved aside whole, and a sentence says so. Else returns "". Raises
        ValueError when the record on disk is shorter than the checkpoint says.
        """
        exists = os.path.lexists(self.path)
        content = text_files.read_bytes(self.path, None, "a record") if exists else b""
        kept = content.split(b"\n")[:lines]
        whole = content.count(b"\n")
        if whole < lines:
            raise ValueError(
                f"{self.path}: has {whole} lines, the checkpoint was written after {lines}; put the record "
                "of this run back beside its checkpoints, or start a fresh run in another --save folder"
            )
        head, told = b"".join(line + b"\n" for line in kept), ""
        if not (_mended(head) == kept if digest is None else hashlib.sha256(head).hexdigest() == digest):
            mended, aside = _before(_mended(content), lines, digest, sample), _free_name(self.path)
            told = (
                f"{self.path} was changed by another hand since the checkpoint was written: {len(mended)} of "
                f"its {lines} lines are kept, the file as it was found lies in {aside.name}"
            )
            text_files.replace(aside, content)
            lines, head, content = len(mended), b"".join(line + b"\n" for line in mended), head
            text_files.replace(self.path, head)
        elif len(head) < len(content):
            text_files.replace(_free_name(self.path), content[len(head) :])
            text_files.replace(self.path, head)
        self._holds(lines, head)
        return told

    def append(self, event, **fields):
        """Write one line and flush it to disk; a torn line left by an earlier failure is
        overwritten. Raises OSError.
        """
        text = _bytes(line(event, fields)) + b"\n"
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            end = min(self.size, file.seek(0, os.SEEK_END))  # a file that somebody has cut gets no hole
            file.seek(end)
            file.truncate()
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.lines, self.size = self.lines + 1, end + len(text)
        self._digest.update(text)


def _bytes(values):
    return json.dumps(values, allow_nan=False).encode()


def _free_name(path):
    n = 1
    while os.path.lexists(name := path.with_name(f"{path.name}.discarded-{n}")):
        n += 1
    return name


def _mended(content):
    """Lines of a record, each once and as it was written, whatever was put between them or done to
    their ends.
    """
    found = {}
    for text in content.splitlines():
        try:
            values = json.loads(text)
            if isinstance(values, dict) and values.get("schema") == SCHEMA:
                found[_bytes(values)] = None
        except (ValueError, RecursionError):
            continue
    return list(found)


def _before(found, lines, digest, sample):
    """The lines that a checkpoint at `sample`, written after `lines` lines, knows of."""
    first = found[:lines]
    if sample is None or hashlib.sha256(b"".join(line + b"\n" for line in first)).hexdigest() == digest:
        return first

    def known(values):
        at = values.get("sample")
        # a probe or word of people at the checkpoint's own sample came after it
        return not isinstance(at, int) or at < sample or (at == sample and values.get("event") != "probe")

    return [line for line in first if known(json.loads(line))]


def fault_step(path):
    """The step whose probe ended the run, as the plug-in left word in `path`; -1 where it left
    none. Raises ValueError for what it has not written.
    """
    if not os.path.lexists(path):
        return -1
    try:
        step = json.loads(text_files.read(path))["step"]
        if type(step) is not int:
            raise TypeError
    except text_files.TextFileError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f'{path}: does not say which probe ended the run; write {{"step": NUMBER}}, or remove the file '
            "to probe at every step again"
        ) from None
    return step


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
    """All lines of a record as dicts, as `each`. A torn last line is left out."""
    return [line for _, line in each(run) if line is not None]


def each(run):
    """(where, line) one by one, where: file and number, line: a dict, None for a torn last one.

    Raises ValueError where a line before the last is damaged or has an unknown schema.
    """
    file = find(run)
    with open(file, "rb") as lines:
        for number, text in enumerate(lines, 1):
            if text == b"\n":
                continue
            where = f"{file}:{number}"
            try:
                event = json.loads(text.decode("utf-8"))
                if not isinstance(event, dict):
                    raise ValueError
            except (ValueError, RecursionError):
                if text.endswith(b"\n"):
                    told = "not a JSON line; restore the file or cut it before this line"
                    raise ValueError(f"{where}: {told}") from None
                yield where, None
                break
            if event.get("schema") != SCHEMA:
                told = f"is not {SCHEMA}; read it with the version that wrote it"
                raise ValueError(f"{where}: schema {shown(event.get('schema'))} {told}")
            yield where, event


def checked(run):
    """The lines as `each`, None for a torn last one. Raises ValueError, too, for what no version
    writes.
    """
    start = None
    for where, line in each(run):
        if line is not None:
            if wrong := shape.fault(line, start):
                raise ValueError(f"{where}: {wrong}; restore the file or cut it before this line")
            if start is None and line["event"] == "start":
                start = line
        yield line
