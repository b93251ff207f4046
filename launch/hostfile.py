"""Prints the nodes of a hostfile as DeepSpeed's launcher reads them, one line `NAME SLOTS` each.

    python launch/hostfile.py FILE

Further fields and comments after the slots are left out. What is no hostfile ends with one line and
exit status 2.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_commute.settings import text_files  # after its folder is on the path

LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,9})(\s.*)?")
NAME = re.compile(r"[\w\[][\w.@:%\[\]-]*")  # a name or address, perhaps with a user; nothing a shell reads


def nodes(path):
    """{name: slots} in the order of the file. Raises ValueError naming file, line and cure."""
    found = {}
    for number, line in enumerate(text_files.read(path, what="a hostfile").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match, where = LINE.fullmatch(line), f"{path}:{number}"
        if match is None or not NAME.fullmatch(match[1]) or int(match[2]) < 1:
            raise ValueError(f"{where}: {shown(line)}: write NAME slots=RANKS")
        if match[1] in found:
            raise ValueError(f"{where}: {match[1]} a second time; one line for each node")
        found[match[1]] = int(match[2])
    if not found:
        raise ValueError(f"{path}: no node in it; write NAME slots=RANKS for each")
    return found


def shown(line):
    return f"'{line}'" if line.isprintable() and len(line) <= 100 else ascii(line[:100])


def main(path):
    try:
        print("".join(f"{name} {slots}\n" for name, slots in nodes(path).items()), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(*sys.argv[1:])
