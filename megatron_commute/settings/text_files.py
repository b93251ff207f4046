"""Files of text: what a person wrote is read in whatever encoding editors save it, what the program
writes appears whole or not at all.
"""

import codecs
import contextlib
import io
import json
import os
import stat
from pathlib import Path

LARGEST = 1 << 20  # bytes of a file that a person writes
_MARKS = (  # byte order marks; that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class TextFileError(ValueError):
    """A file that cannot be read as text; the message names the file and the cure, in one line."""


def read(path, most=LARGEST, what="a file"):
    """The text of a regular file of at most `most` bytes, its lines ending with line feeds. what:
    it should be, for the cure.

    UTF-8, with or without a byte order mark; UTF-16 and UTF-32 with one. Never waits, however odd
    the file. Raises TextFileError.
    """
    raw = read_bytes(path, most, what)
    mark, encoding = next(((m, e) for m, e in _MARKS if raw.startswith(m)), (b"", "utf-8"))
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark and encoding != "utf-8":
            raise TextFileError(
                f"{path}: is no whole {encoding[:6].upper()} text; save it as UTF-8"
            ) from None
        line = raw[: error.start].count(b"\n") + 1
        raise TextFileError(
            f"{path}:{line}: is not UTF-8 text; save it as UTF-8 (iconv -f CP1252 -t UTF-8, "
            "or the encoding that it has)"
        ) from None
    if "\0" in text:
        raise TextFileError(f"{path}: holds zero bytes, as UTF-16 without a mark does; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_object(path, what="a JSON file"):
    """The JSON object that a file holds, as a dict; as `read`."""

    def refuse(constant):
        raise ValueError(f"{constant} is no number of JSON")

    text = read(path, what=what)
    try:
        found = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise TextFileError(f"{path}: is nested too deeply; write a flat object") from None
    except ValueError as error:
        raise TextFileError(f"{path}: is not JSON: {error}; correct it") from None
    if not isinstance(found, dict):
        raise TextFileError(f"{path}: is no JSON object; write {{NAME: VALUE}}")
    return found


def read_bytes(path, most=LARGEST, what="a file"):
    """The content of a regular file of at most `most` bytes (None: any), without waiting; what: as
    in `read`. Raises TextFileError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TextFileError(f"{path}: is {_kind(path)}; name {what}")
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise TextFileError(f"{path}: is no regular file; name {what}")
            raw = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise TextFileError(f"{path}: cannot be read: {error.strerror}; name {what}") from None
    except ValueError as error:
        if isinstance(error, TextFileError):
            raise
        raise TextFileError(f"{str(path)!r}: no name of a file ({error}); name {what}") from None
    if most is not None and len(raw) > most:
        raise TextFileError(f"{path}: holds more than {most >> 10} KiB; write a shorter file")
    return raw


def _kind(path):
    mode = os.stat(path).st_mode
    return "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "no regular file"


def replace(path, content):
    """Write `content`, str or bytes, as the whole of a file: whoever reads it sees the old one or
    this one, even if the disk is full or the process is killed.

    A link is replaced, never followed; only a device or pipe behind a name (/dev/stdout) is written
    into. Raises OSError, and leaves nothing behind.
    """
    path, raw = Path(path), content.encode("utf-8") if isinstance(content, str) else content
    if _is_stream(path):
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe nobody reads is refused
        os.set_blocking(handle, True)
        with open(handle, "wb") as file:
            file.write(raw)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()  # of a process that was killed, or a link
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def replacing(path):
    """A buffer for text, which becomes the whole of a file when the block ends; as `replace`."""
    text = io.StringIO(newline="")
    yield text
    replace(path, text.getvalue())


def _is_stream(path):
    """Whether a name leads to a device, or by a link to a pipe."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or (stat.S_ISFIFO(mode) and path.is_symlink())
