"""Own processor time of law flow in mode act beyond the probes: `python tests/bench/flow_cost.py` rewrites
tests/bench/results/flow/cost.csv.

Processor time, not the clock, of the decisions and of the look at the control file over one run, a probe's measurement left
out; per step of the run. Beside it the same with law hold: the difference is what flow asks for.
"""

import csv
import sys
import time
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "support"), str(HERE.parent.parent)]

import flow_jobs

from megatron_commute.settings.rates import RateSchedule, rates

LIMIT = 100.0  # microseconds a step
WATCH_EVERY = 10  # steps between log lines, with which the control file is looked at
COLUMNS = ("steps", "domains", "every", "decisions", "start_ms", "decision_ms", "flow_us_a_step", "hold_us_a_step",
           "watch_us_a_step", "below_100_us")  # fmt: skip


def steering_of(law, steps, domains, every):
    """(Steering of such a run, processor seconds of planning it)."""
    shares = np.random.default_rng(0).dirichlet(4 * np.ones(domains))
    told = rates(RateSchedule(lr=3e-4, train_iters=steps, lr_warmup_iters=steps // 100))
    free, wide = np.zeros(domains, dtype=bool), (np.zeros(domains), np.ones(domains))
    begun = time.process_time()
    made = flow_jobs.steering(shares, free, *wide, steps, every, law=law, rates=told.__getitem__)
    return made, time.process_time() - begun


def measured(domains):
    """What a probe hands on."""
    return types.SimpleNamespace(score=np.zeros((1, domains)), score_se=np.ones((1, domains)))


def spent(steering, steps, domains, every):
    """(processor seconds of all decisions, their number, those of all looks at the control file) of one run."""
    deciding = looking = 0.0
    number = 0
    for step in range(0, steps, every):
        begun = time.process_time()
        steering.begin() if step == 0 else steering.decide(measured(domains))
        deciding, number = deciding + time.process_time() - begun, number + 1
        begun = time.process_time()
        for _ in range(0, every, WATCH_EVERY):
            steering.look()
        looking += time.process_time() - begun
        steering.stream.consumed.skip(min(every, steps - step) * flow_jobs.BATCH)
    return deciding, number, looking


def row(steps, domains, every):
    """One line of the table."""
    law, start = steering_of("flow", steps, domains, every)
    deciding, number, looking = spent(law, steps, domains, every)
    held, _, _ = spent(steering_of("hold", steps, domains, every)[0], steps, domains, every)
    own = 1e6 * (start + deciding) / steps
    values = (
        steps, domains, every, number, 1e3 * start, 1e3 * deciding / number, own, 1e6 * held / steps,
        1e6 * looking / steps, own < LIMIT,
    )  # fmt: skip
    return dict(zip(COLUMNS, (f"{v:.3g}" if isinstance(v, float) else v for v in values), strict=True))


def main():
    rows = []
    for domains in (3, 22):
        for steps, every in ((2000, 100), (20000, 100), (20000, 1000), (100000, 1000)):
            rows.append(row(steps, domains, every))
            print(rows[-1], flush=True)
    out = HERE / "results" / "flow" / "cost.csv"
    out.parent.mkdir(exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
