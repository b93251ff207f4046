#!/usr/bin/env python3
"""The quickstart's comparison over paired seeds: law flow against the constant mixture, under two
learning-rate schedules.

    python tests/bench/quickstart_pairs.py OUT [--seeds 5] [--at-once 2]

Every pair is `bash launch/quickstart.sh --compare` in a folder of its own, on one rank and without
probes, which change no loss. Each finished pair is added to launch/results/pairs.csv; those that are
there are not trained again. Draws launch/results/pairs.png.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "launch" / "results"
sys.path.insert(0, str(ROOT / "launch"))

import quickstart_compare  # noqa: E402
import quickstart_mixture  # noqa: E402

from megatron_commute import intervals  # noqa: E402
from megatron_commute.experiments.bilingual_tables import write_csv  # noqa: E402
from megatron_commute.settings import text_files  # noqa: E402

DECAYS = ("cosine", "WSD")
FIRST_SEED = 1234
ITERATIONS, BATCH = 500, 16


def prepared(out):
    """The folder of tokenized text that all pairs read, made once."""
    data = out / "data"
    subprocess.run([sys.executable, ROOT / "launch/prepare_data.py", "--out", data], check=True)
    return data


def pair(out, decay, seed):
    """Rows of quickstart_compare of one pair of runs, trained where it is not finished."""
    place = out / f"{decay}-{seed}"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "data").exists():
        (place / "data").symlink_to(out / "data")
    mixture = place / "mixture.yaml"
    if not mixture.exists():
        names = list(json.loads((out / "data/data.json").read_text(encoding="utf-8"))["domains"])
        told = quickstart_mixture.fitted(names, "data", ITERATIONS, ITERATIONS * BATCH, "flow", seed)
        every = next(line for line in told.splitlines() if line.startswith("every:"))
        text_files.replace(mixture, told.replace(every, f"every: {ITERATIONS}"))
    own = {"QUICKSTART_DIR": str(place), "QUICKSTART_DECAY": decay, "QUICKSTART_SEED": str(seed)}
    own |= {"QUICKSTART_ITERS": str(ITERATIONS), "QUICKSTART_RANKS": "1"}
    with open(place / "output.log", "ab") as log:
        command = ["bash", ROOT / "launch/quickstart.sh", "--compare"]
        subprocess.run(command, env={**os.environ, **own}, stdout=log, stderr=log, check=True)
    rows = quickstart_compare.compared(str(place / "run"), str(place / "constant"))
    return [{"decay": decay, "seed": seed, **row} for row in rows]


def summary(rows):
    """Rows {"decay", "domain", "pairs", "percent", "half": of the 95 % interval} in their order."""
    found = {}
    for row in rows:
        found.setdefault((row["decay"], row["domain"]), []).append(row["percent"])
    result = []
    for (decay, domain), values in found.items():
        n = len(values)
        half = intervals.student(n - 1) * np.std(values, ddof=1) / n**0.5
        row = {"decay": decay, "domain": domain, "pairs": n, "percent": float(np.mean(values)), "half": half}
        result.append(row)
    return result


def drawn(rows, path):
    """The changes of every pair, with means and 95 % intervals."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(row["domain"] for row in rows))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots(1, len(DECAYS), sharey=True)
    for decay, ax in zip(DECAYS, axes, strict=True):
        means = {row["domain"]: row for row in summary(rows) if row["decay"] == decay}
        for place, domain in enumerate(domains):
            values = [row["percent"] for row in rows if (row["decay"], row["domain"]) == (decay, domain)]
            row = means[domain]
            ax.plot(np.linspace(-0.25, -0.1, len(values)) + place, values, ".", color="0.6")
            ax.errorbar(place + 0.1, row["percent"], row["half"], fmt="o", color="C0", capsize=3)
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_xticks(range(len(domains)), [name.replace("training ", "training\n") for name in domains])
        ax.set_title(f"{decay}, {means[domains[0]]['pairs']} pairs of runs")
    axes[0].set_ylabel("change of the final\nvalidation loss by law flow (%)")
    figure.savefig(path, dpi=160)


def kept():
    """Rows of the pairs that are in the table already."""
    if not (RESULTS / "pairs.csv").exists():
        return []
    with open(RESULTS / "pairs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["seed"] = int(row["seed"])
        row |= {name: float(row[name]) for name in ("share", "run", "against", "percent")}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="folder of data and runs")
    parser.add_argument("--seeds", type=int, default=5, help="pairs under each decay")
    parser.add_argument("--at-once", type=int, default=2, help="pairs that train side by side")
    arguments = parser.parse_args()
    out, rows = arguments.out.resolve(), kept()
    done = {(row["decay"], row["seed"]) for row in rows}
    asked = [(decay, FIRST_SEED + n) for n in range(arguments.seeds) for decay in DECAYS]
    asked = [one for one in asked if one not in done]
    if asked:
        prepared(out)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        waiting = [pool.submit(pair, out, *one) for one in asked]
        for ready in as_completed(waiting):
            rows = sorted(rows + ready.result(), key=lambda row: (row["decay"], row["seed"]))
            write_csv(RESULTS / "pairs.csv", rows)
    drawn(rows, RESULTS / "pairs.png")
    for row in summary(rows):
        change = f"{row['percent']:+6.2f} ± {row['half']:.2f} %"
        print(f"{row['decay']:8s}{row['domain']:18s}{change}  ({row['pairs']} pairs)")


if __name__ == "__main__":
    main()
