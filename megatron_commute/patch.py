"""Put our two diffs on a tree of Megatron-DeepSpeed, or take them off: all files or none, and never
twice.

The tree may be a plain export: git is not needed. Lines are found by their text, so a newer tree in
which they moved is patched as well, and one in which they are gone is refused by name.
"""

import importlib.metadata
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

NAMES = ("hook", "modern-stack")
COMMIT = "4efb479d"  # of Megatron-DeepSpeed, which the diffs were made against
_MARKS = {"pretrain_gpt.py": "pretrain(", "megatron/training.py": "deepspeed.initialize("}
# where the hook only refuses: a tree may lack them, or have the hook of 0.2.0, which left them out
_OTHER_SCRIPTS = ("pretrain_bert.py", "pretrain_t5.py")
_HEADER = re.compile(r"@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@ ?(.*)")


class PatchError(ValueError):
    """The tree cannot be patched; nothing was written."""


class Change(NamedTuple):
    """One hunk. line: 1-based, in the tree of COMMIT; before, after: the lines it turns into each
    other, with the line above where it only inserts.
    """

    line: int
    before: tuple
    after: tuple


class Found(NamedTuple):
    """Where a change stands in one file: at line `line` (1-based) of it, applied or not."""

    patch: str
    file: str
    change: Change
    line: int
    applied: bool


def folder():
    """The folder of our diffs: that of the repository, or what the installed package brought along.
    PatchError without.
    """
    above = Path(__file__).resolve().parent.parent
    try:
        files = importlib.metadata.files("megatron-commute") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    installed = [Path(file.locate()).parent for file in files if file.name == "hook.patch"]
    # the last is where `pip install --target` puts them
    for found in (above / "patches", *installed, above / "share/megatron_commute/patches"):
        if (found / "hook.patch").is_file():
            return found.resolve()
    raise PatchError("the diffs were not installed with the package: reinstall megatron-commute")


def changes(name):
    """{file: [Change]} of one of our diffs, which have no context lines."""
    found, file = {}, None
    for line in (folder() / f"{name}.patch").read_text(encoding="utf-8").splitlines():
        if line.startswith("+++ b/"):
            file = found.setdefault(line[6:], [])
        elif header := _HEADER.match(line):
            file.append([int(header[1]), header[2], [], []])
        elif file and line[0] in "-+" and not line.startswith("--- a/"):
            file[-1][2 + (line[0] == "+")].append(line[1:])
    return {
        path: [
            Change(at, tuple(old), tuple(new)) if old else Change(at, (above,), (above, *new))
            for at, above, old, new in hunks
        ]
        for path, hunks in found.items()
    }


def inspect(root, names=NAMES):
    """Where each change of the diffs `names` stands in the tree `root`: a list of Found.

    Raises PatchError where `root` is not Megatron-DeepSpeed, where a line that a change needs is
    gone, and where a diff is there in part only.
    """
    root = Path(root)
    for mark, text in _MARKS.items():
        if not (root / mark).is_file() or text not in _read(root / mark):
            raise PatchError(
                f"{root}: not Megatron-DeepSpeed ({mark} with {text!r} is missing); name the folder of its "
                "pretrain_gpt.py"
            )
    found = []
    for name in names:
        rows = [
            _locate(root, name, file, change)
            for file, hunks in changes(name).items()
            for change in hunks
            if file not in _OTHER_SCRIPTS or (root / file).is_file()
        ]
        if len({row.applied for row in rows if row.file not in _OTHER_SCRIPTS}) > 1:
            done = ", ".join(f"{row.file}:{row.line}" for row in rows if row.applied)
            rest = ", ".join(f"{row.file}:{row.line}" for row in rows if not row.applied)
            raise PatchError(
                f"{root}: {name} is there in part only (changed: {done}; not changed: {rest}); restore "
                f"these files, or change the rest by hand after patches/{name}.patch"
            )
        found += rows
    return found


def patch(root, do="apply", names=NAMES):
    """Bring the tree `root` to a state; do: "apply", "revert" or "check" (which writes nothing).

    Returns one dict for each change: patch, file, line (1-based), moved_from (its line in COMMIT,
    or None where it did not move), state ("applied" or "absent", afterwards) and did ("applied",
    "reverted" or None where there was nothing to do). Raises PatchError, before anything is
    written, for a tree it does not recognise or cannot write.
    """
    root, wanted = Path(root), {"apply": True, "revert": False}.get(do)
    found = inspect(root, names)
    todo = [row for row in found if wanted is not None and row.applied != wanted]
    lines = {file: _lines(root / file) for file in {row.file for row in todo}}
    for row in sorted(
        todo, key=lambda row: -row.line
    ):  # from the bottom up, so that lines keep their numbers
        old, new = row.change.after, row.change.before
        if wanted:
            old, new = new, old
        text, place = lines[row.file], slice(row.line - 1, row.line - 1 + len(old))
        last = re.search(r"\r?\n?$", text[place][-1])[0]  # a file may lack the line feed at its end
        text[place] = [line + (last or "\n") for line in new[:-1]] + [new[-1] + last]
    _write({root / file: "".join(text) for file, text in lines.items()})
    return [_told(row, None if row not in todo else wanted) for row in found]


def sentences(rows):
    """One line of text for each change that `patch` returned."""
    done = {"applied": "applied now", "reverted": "taken off now"}
    for row in rows:
        still = "applied already" if row["state"] == "applied" else "not applied"
        moved = f" (line {row['moved_from']} of {COMMIT})" if row["moved_from"] else ""
        yield f"{row['patch']}: {row['file']}:{row['line']}{moved}: {done.get(row['did'], still)}"


def _told(row, did):
    applied = row.applied if did is None else did
    return {
        "patch": row.patch,
        "file": row.file,
        "line": row.line,
        "moved_from": row.change.line if row.line != row.change.line and not row.applied else None,
        "state": "applied" if applied else "absent",
        "did": None if did is None else ("applied" if did else "reverted"),
    }


def _locate(root, name, file, change):
    path = root / file
    if not path.is_file():
        raise PatchError(
            f"{root}: {file} is missing, which {name} changes; choose the other diff with --only"
        )
    lines = [line.rstrip("\r\n") for line in _lines(path)]
    after = _starts(lines, change.after)
    covered = {at + i for at in after for i in range(len(change.after))}
    before = [at for at in _starts(lines, change.before) if at not in covered]
    inserts = change.after[: len(change.before)] == change.before
    own = {line.strip() for line in change.after[1:]} if inserts else set()
    strays = [at for at, line in enumerate(lines) if line.strip() in own and at not in covered]
    if len(before) > 1 and change.line - 1 in before:
        before = [change.line - 1]
    if strays or len(after) + len(before) > 1:
        places = ", ".join(str(at + 1) for at in sorted(strays + after + before))
        raise PatchError(
            f"{path}: {name} cannot tell which of the lines {places} to change (patched by hand?); restore "
            "the file"
        )
    if not after + before:
        raise PatchError(
            f"{path}: line {change.line} of {COMMIT} has moved away or changed, so {name} cannot be "
            f"applied; it was:\n    {change.before[0].strip()}\nchange its successor by hand after "
            f"patches/{name}.patch, or choose the other diff with --only"
        )
    return Found(name, file, change, (after + before)[0] + 1, bool(after))


def _starts(lines, block):
    """Indices at which the lines of `block` follow each other in `lines`."""
    size = len(block)
    return [at for at in range(len(lines) - size + 1) if tuple(lines[at : at + size]) == block]


def _read(path):
    """Text with its own line endings, and bytes that are not UTF-8 kept as they are."""
    return path.read_bytes().decode("utf-8", "surrogateescape")


def _lines(path):
    """Lines with their endings; split at line feeds only, as a form feed is no end of a line."""
    return re.findall(r"[^\n]*\n|[^\n]+", _read(path))


def _write(contents):
    """Replace the files {path: text}, all or none."""
    kept, prepared = {}, {}
    try:
        for path, text in contents.items():
            path = path.resolve()
            kept[path] = path.read_bytes(), path.stat().st_mode
            if not kept[path][1] & stat.S_IWUSR:
                raise PermissionError(f"{path} is read-only")
            prepared[path] = _beside(path, text.encode("utf-8", "surrogateescape"), kept[path][1])
        done = []
        try:
            for path, temporary in prepared.items():
                os.replace(temporary, path)
                done.append(path)
        except OSError:
            for path in done:
                os.replace(_beside(path, *kept[path]), path)
            raise
    except OSError as fault:
        raise PatchError(f"nothing was changed: {fault}; make the tree writable") from fault
    finally:
        for temporary in prepared.values():
            Path(temporary).unlink(missing_ok=True)


def _beside(path, content, mode):
    """A temporary file next to `path` with this content and mode."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, stat.S_IMODE(mode))
    return temporary
