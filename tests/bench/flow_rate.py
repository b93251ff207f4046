"""How much of its plan law flow in mode act follows under a bound on the change of a weight: `python
tests/bench/flow_rate.py` rewrites results/flow/rate.csv.

500 steps, shares .6 .3 .1, target the last domain; decisions every 10 to 100 steps, `controller.rate` 0.05, 0.1 or 1. Column
`followed`: the projection of the target's weights over the run, less its share, on those of the plan.
"""

import csv
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
import flow_jobs

from megatron_commute.settings.rates import RateSchedule, rates

STEPS, SHARES = 500, np.array([0.6, 0.3, 0.1])
STYLES = {"WSD": {"lr_wsd_decay_iters": 100}, "cosine": {}}
EVERY, RATES = (10, 25, 50, 100), (1.0, 0.1, 0.05)


def weights(told, every, rate):
    """Weight f64[STEPS] of the target, step by step."""
    free, least = np.zeros(3, dtype=bool), np.zeros(3)
    wide = {"rates": told.__getitem__, "rate": rate}
    steering = flow_jobs.steering(SHARES, free, least, least + 1, STEPS, every, **wide)
    steering.begin()
    seen = []
    for step in range(STEPS):
        if step and step % every == 0:
            steering.decide(None)
        seen.append(steering.stream.weights[-1])
        steering.stream.take()
    return np.array(seen)


def rows():
    for style, more in STYLES.items():
        told = rates(
            RateSchedule(
                lr=1e-3, min_lr=1e-4, train_iters=STEPS, lr_warmup_iters=25, lr_decay_style=style, **more
            )
        )
        plan = weights(told, EVERY[0], 1.0) - SHARES[-1]
        for every in EVERY:
            for rate in RATES:
                moved = weights(told, every, rate) - SHARES[-1]
                about = {"style": style, "decisions": STEPS // every, "rate": rate}
                yield {**about, "followed": round(float(moved @ plan / (plan @ plan)), 3)}


def main():
    found = list(rows())
    with (HERE / "results" / "flow" / "rate.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    for row in found:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
