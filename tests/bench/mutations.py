"""What every reader of files makes of mutated files: a table of readers, mutations and outcomes.

    python tests/bench/mutations.py [--count N] [--first SEED] [--only NAME] [--out FILE]

Every reader of tests/support/mutation_readers_*.py gets N files (default 2000) with the seeds from
SEED on, in forked workers with 10 s and 1 GB for each. Outcomes `same` (what an independent reader
gives) and `refused` (one named exception, one line) are allowed; status 1 where there is another,
with the seeds that repeat it. The table goes to results/mutations.csv; a minute a reader.
"""

import argparse
import csv
import importlib
import re
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parents[1])]

import mutations

OUTCOMES = (*mutations.ALLOWED, *mutations.FAULTS)
MODULES = sorted(path.stem for path in (HERE.parent / "support").glob("mutation_readers_*.py"))


def rows(reader, found):
    """One row for each mutation of a reader: the first that was done to a file counts, whatever followed."""
    by_kind = {}
    for (kind, outcome), count in found.kinds.items():
        by_kind.setdefault(re.sub(r" (\d+|again)$", "", kind), Counter())[outcome] += count
    for kind, counts in sorted(by_kind.items()):
        yield [reader.name, kind, sum(counts.values()), *(counts[outcome] for outcome in OUTCOMES)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "mutations.csv")
    args = parser.parse_args()
    readers = [reader for name in MODULES for reader in importlib.import_module(name).READERS]
    table, faults = [["reader", "mutation", "attempts", *OUTCOMES]], 0
    for reader in (reader for reader in readers if args.only in reader.name):
        found = mutations.attack(reader, args.count, args.first)
        own = list(rows(reader, found))
        table += own
        total = [sum(numbers) for numbers in zip(*(row[2:] for row in own), strict=True)]
        if len(table) == len(own) + 1:
            print(f"{'reader':<34}{'mutation':<14}" + "".join(f"{name:>10}" for name in table[0][2:]))
        for row in [*own, [reader.name, "all", *total]]:
            print(f"{row[0]:<34}{row[1]:<14}" + "".join(f"{number:>10}" for number in row[2:]), flush=True)
        faults += len(found.faults)
        if found.faults:
            print(found.told(), file=sys.stderr)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
