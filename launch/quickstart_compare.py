#!/usr/bin/env python3
"""Two finished runs side by side: the last validation loss of every domain, and the difference in
percent.

The runs must have trained on the same budgets; the record of each (commute.jsonl) says.
"""

import argparse
import json
import sys

from megatron_commute.record import log


def final(folder):
    """(start line, last validation losses by domain) of a finished run. ValueError for one that is
    not.
    """
    lines = log.read(folder)
    start = next((line for line in lines if line["event"] == "start"), None)
    readings = [line for line in lines if line.get("valid")]
    if start is None or lines[-1]["event"] != "end" or not readings:
        raise ValueError(f"{folder}: not a finished run with validation losses; train it to its end")
    return start, readings[-1]["valid"]


def compared(run, against):
    """Rows of {domain, share of the target, loss of either, percent} and one for the training
    mixture.
    """
    (start, losses), (other, before) = final(run), final(against)
    for what in ("names", "budgets", "samples", "seq_length", "global_batch"):
        if start[what] != other[what]:
            raise ValueError(
                f"{what} of {run}: {start[what]}, of {against}: {other[what]}; compare runs of equal data"
            )
    served = [budget / start["samples"] for budget in start["budgets"]]
    rows = [
        {"domain": name, "share": share, "target": target, "run": losses[name], "against": before[name]}
        for name, share, target in zip(start["names"], served, start["target"], strict=True)
    ]
    mixture = {key: sum(row["share"] * row[key] for row in rows) for key in ("run", "against")}
    rows.append({"domain": "training mixture", "share": 1.0, "target": None, **mixture})
    return [row | {"percent": 100 * (row["run"] / row["against"] - 1)} for row in rows]


def table(rows, names):
    """The rows as text; names: of the two runs."""
    from tabulate import tabulate

    headers = ["domain", "share of samples", "of target", *names, "difference"]
    cells = [
        [
            row["domain"],
            f"{row['share']:.2f}",
            "" if row["target"] is None else f"{row['target']:.2f}",
            f"{row['run']:.4f}",
            f"{row['against']:.4f}",
            f"{row['percent']:+.2f} %",
        ]
        for row in rows
    ]
    return tabulate(cells, headers, disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", help="folder of the run under law flow")
    parser.add_argument("against", help="folder of the run with the constant mixture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    try:
        rows = compared(arguments.run, arguments.against)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if arguments.json else table(rows, ("law flow", "constant mixture")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
