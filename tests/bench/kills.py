"""Fifty random SIGKILLs of runs under law flow in mode act, with 1, 2 or 4 ranks at every start and one change of target.

    python tests/bench/kills.py [--kills 50]

rewrites tests/bench/results/flow/kills.csv, one row for each run.
"""

import argparse
import csv
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent.parent)]
import killed_runs

EACH = 10  # kills of one run


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    kills, rows = parser.parse_args().kills, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        killed_runs.prepare(folder)
        _, expected = killed_runs.whole(folder, "undisturbed", 0, seed=0)
        while (done := sum(row["kills"] for row in rows)) < kills:
            seed = len(rows) + 1
            row, brought = killed_runs.whole(folder, f"run{seed}", min(EACH, kills - done), seed)
            rows.append({**row, "same_as_undisturbed": brought == expected})
            print(rows[-1], flush=True)
    out = HERE / "results" / "flow" / "kills.csv"
    out.parent.mkdir(exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
