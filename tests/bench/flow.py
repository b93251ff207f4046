"""What law flow's plan costs: python tests/bench/flow.py [FOLDER]

Writes flow.csv into FOLDER (default: here): seconds to plan a whole run (median and quartiles of 21),
how many copies of its learning rates take as long, and bytes of its state as JSON.
"""

import csv
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_commute.decide import flow
from megatron_commute.settings.rates import RateSchedule, rates

RUNS = ((2_000, 512, 3), (2_000, 512, 20), (100_000, 1024, 3), (100_000, 1024, 20))  # steps, batch, domains


def row(steps, batch, K):
    shares = np.random.default_rng(K).dirichlet(np.full(K, 2.0))
    budgets = np.floor(shares * steps * batch).astype(int)
    budgets[0] += steps * batch - budgets.sum()
    flags = {"lr": 3e-4, "min_lr": 3e-5, "train_iters": steps, "lr_warmup_iters": steps // 100}
    own, target = rates(RateSchedule(**flags, lr_decay_style="cosine")), np.eye(K)[int(shares.argmin())]
    about = {"rates": own, "batches": np.full(steps, batch), "budgets": budgets.tolist(), "weights": shares}
    about |= {"target": target, "low": np.zeros(K), "high": np.ones(K)}
    spent, copies = [], []
    for _ in range(21):
        begun = time.perf_counter()
        found = flow.planned(**about)
        spent.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        own.copy()
        copies.append(time.perf_counter() - begun)
    state = {"scale": asdict(found.scale), "memory": flow.MEMORY, "kept": flow.kept_steps(steps), "begin": 0}
    state |= {"used": None, "retired": 0, "target": target.tolist(), "strength": 1.0}
    low, middle, high = np.quantile(spent, [0.25, 0.5, 0.75])
    return {
        "samples": steps * batch,
        "steps": steps,
        "domains": K,
        "milliseconds": round(1e3 * middle, 3),
        "quartiles": f"{1e3 * low:.3f} to {1e3 * high:.3f}",
        "copies_of_the_rates": round(middle / float(np.median(copies))),
        "state_bytes": len(json.dumps(state)),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    found = [row(*run) for run in RUNS]
    with open(folder / "flow.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, found[0])
        table.writeheader()
        table.writerows(found)
    for each in found:
        print(each)
