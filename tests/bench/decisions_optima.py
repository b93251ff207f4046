"""Problems of the study decisions.py, and the best schedule of each: what a law could gain at most.

    python tests/bench/decisions_optima.py --jobs 2 [--axes base K2 ...]

Adds to decisions_optima.csv the lines that it lacks (delete those to be searched anew), half a second to seven each.
A schedule of 32 windows is descended (exact adjoint, SLSQP under the budgets) from the better of three starts: the constant
mixture, tau-tail and the constant mixture's own steepest switch, each improved by 60 rounds of mirror descent first.
"""

import argparse
import csv
import itertools
import multiprocessing
import sys
from pathlib import Path

import numpy as np

from megatron_commute.experiments import receding_plan
from megatron_commute.experiments.quadratic_domains import sample
from megatron_commute.experiments.quadratic_search import constrained

HERE = Path(__file__).resolve().parent
CACHE = HERE / "decisions_optima.csv"
WINDOWS, SEEDS = 32, 10
TIMES, BUDGETS = (1.0, 4.0, 16.0, 64.0), ("equal", "skewed")
AXES = {  # name: domains, dimensions, spectrum, shared eigenbasis
    "base": (3, 40, "0.8^j", False),
    "K2": (2, 40, "0.8^j", False),
    "K8": (8, 40, "0.8^j", False),
    "n100": (3, 100, "0.8^j", False),
    "0.7^j": (3, 40, "0.7^j", False),
    "1/j": (3, 40, "1/j", False),
    "shared": (3, 40, "0.8^j", True),
}
COLUMNS = ("axis", "time", "budgets", "seed", "constant", "tau_tail", "optimum")


def problem(axis, seed):
    """(Quadratic, theta0 f64[n]) of one axis and seed."""
    domains, n, spectrum, shared = AXES[axis]
    j = np.arange(n)
    rates = {"0.8^j": 0.8**j, "0.7^j": 0.7**j, "1/j": 1 / (1 + j)}[spectrum]
    return sample(seed, n=n, domains=domains, spectrum=rates, shared=shared)


def shares(axis, budgets):
    """Budgets f64[K] as fractions of the run."""
    K = AXES[axis][0]
    if budgets == "equal":
        return np.full(K, 1 / K)
    part = {2: np.array([0.75, 0.25]), 3: np.array([0.6, 0.3, 0.1])}.get(K, 0.7 ** np.arange(K))
    return part / part.sum()


def tau_tail(budget, target, windows=WINDOWS):
    """The whole schedule f64[windows, K] of the law tau-tail, written down independently of laws.py."""
    rest = budget * windows
    tail = (rest / target).min()
    first = windows - tail
    if first < 1e-9:
        return np.tile(budget, (windows, 1))
    part = np.clip(first - np.arange(windows), 0, 1)[:, None]
    return part * (rest - tail * target) / first + (1 - part) * target


def best(model, times, budget, starts, rounds=60):
    """(lowest change of the target loss, its schedule f64[M, K])."""
    M, K = starts[0].shape
    sizes, rest = np.ones(M), budget * M
    begun = []
    for w in starts:
        w = receding_plan.spread(np.maximum(w, 1e-3), sizes, rest)
        w, value, _ = receding_plan.descend(model, w, times, sizes, rest, rounds)
        begun.append((float(value), w))
    value, w = min(begun, key=lambda found: found[0])
    scale = 100 / abs(value)

    def objective(weights):
        change, slope = receding_plan.loss_gradient(model, weights, times)
        return scale * change, scale * slope

    found = constrained(objective, w, rest, 1000, 1e-9)
    exact = receding_plan.spread(np.clip(found.x.reshape(M, K), 1e-12, 1.0), sizes, rest, 1)
    return min((value, w), (float(receding_plan.loss_change(model, exact, times)), exact), key=lambda f: f[0])


def row(axis, time, budgets, seed):
    """One line of the cache."""
    domains, theta0 = problem(axis, seed)
    budget, K = shares(axis, budgets), AXES[axis][0]
    target, times = np.full(K, 1 / K), np.full(WINDOWS, time / WINDOWS)
    model = receding_plan.Quadratic(H=domains.A, g=domains.gradients(theta0), target=target)
    loss = float(target @ domains.losses(theta0))
    constant, tail = np.tile(budget, (WINDOWS, 1)), tau_tail(budget, target)
    slope = receding_plan.loss_gradient(model, constant, times)[1]
    slope = slope - slope.mean(0)
    steep = constant * np.exp(-2 * slope / np.abs(slope).max())
    optimum, _ = best(model, times, budget, [constant, tail, steep])
    ends = [float(receding_plan.loss_change(model, w, times)) for w in (constant, tail)]
    return dict(
        zip(COLUMNS, (axis, time, budgets, seed, *(loss + end for end in (*ends, optimum))), strict=True)
    )


def cached(axes):
    """{(axis, time, budgets, seed): line with floats} of the committed file."""
    with open(CACHE, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["axis"] in axes]
    for line in lines:
        line.update(
            {name: float(line[name]) for name in ("time", "constant", "tau_tail", "optimum")},
            seed=int(line["seed"]),
        )
    return {(line["axis"], line["time"], line["budgets"], line["seed"]): line for line in lines}


def write(lines):
    """The file of {(axis, time, budgets, seed): line}, in the order of the study."""
    ordered = sorted(lines.items(), key=lambda item: (list(AXES).index(item[0][0]), *item[0][1:]))
    with open(CACHE, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for _, line in ordered:
            writer.writerow({k: f"{v:.12g}" if isinstance(v, float) else v for k, v in line.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    lines = cached(AXES) if CACHE.exists() else {}
    wanted = itertools.product(asked.axes, TIMES, BUDGETS, range(SEEDS))
    missing = [key for key in wanted if key not in lines]
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for key, line in zip(missing, pool.imap(_row, missing), strict=True):
            lines[key] = line
            write(lines)
            print(*key, file=sys.stderr, flush=True)


def _row(key):
    return row(*key)


if __name__ == "__main__":
    main()
