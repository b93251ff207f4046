"""What decisions are worth: every law on random quadratics with exact flows, against the best schedule of each problem.

    python tests/bench/decisions.py --jobs 2   # base cells and one axis at a time
    python tests/bench/decisions.py --quick    # two seeds, two flow times, two noise levels, for CI

Writes decisions.csv, a line for each cell and law. 32 decisions a run, all through controller.decide, without floors, caps,
rate limit and cool-down. share: part of the attainable gain in percent, median and worst over seeds; the best schedules,
decisions_optima.csv, were searched on 2026-11-22 by decisions_optima.py, last in commit 6a863e7. harm: worst increase of the
final loss over the constant mixture, percent of the loss. noise: relative, on every gradient and product, isotropic, each
the mean of two independent halves whose difference is the only thing a law is told about it. products: Hessian-vector
products a decision, mean over the run.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import sys
import time as clock
from pathlib import Path

import numpy as np

from megatron_commute import bracket
from megatron_commute.decide.controller import decide
from megatron_commute.decide.situation import Situation
from megatron_commute.experiments.quadratic_domains import sample
from megatron_commute.experiments.receding import Recycled
from megatron_commute.experiments.receding_law import receding
from megatron_commute.feasible import nearest

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
LAWS = ("proportional", "tau-tail", "tilt", "odm", "receding")
NOISE = (0.0, 0.1, 0.3, 1.0)
START = 24  # directions at the first decision; then one at every second, so at most K + 1 products a decision on average
GRAIN = 1000  # samples a window
FIELDS = ("axis", "time", "budgets", "noise", "law", "seeds")
FIELDS += ("share_median", "share_worst", "harm_worst_percent", "products")


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


class Run:
    """One problem under one law; observe() is all that the law sees."""

    def __init__(self, axis, time, budgets, noise, seed):
        self.domains, self.theta = problem(axis, seed)
        self.budget, self.h, self.noise = shares(axis, budgets), time / WINDOWS, noise
        self.K, self.n = self.domains.b.shape
        self.target = np.full(self.K, 1 / self.K)
        self.rng = np.random.default_rng([seed, int(100 * noise), int(time), BUDGETS.index(budgets)])
        self.recycled, self.model, self.memory, self.products = Recycled(self.K), None, {}, 0

    def noisy(self, vectors, factor=1.0):
        """Rows [m, n] as measured, and the standard error [m] of one entry, both from two halves."""
        size = factor * self.noise * np.linalg.norm(vectors, axis=1, keepdims=True) / np.sqrt(self.n)
        halves = vectors + np.sqrt(2) * size * self.rng.standard_normal((2, *vectors.shape))
        return halves.mean(0), np.sqrt(((halves[0] - halves[1]) ** 2).mean(1)) / 2

    def signals(self, law, w, left):
        """The fields of a Situation that `law` needs; `receding` gets a model that is learned here."""
        gradients = self.domains.gradients(self.theta)
        losses = self.domains.losses(self.theta)
        if law == "odm":
            return {"losses": losses * (1 + self.noise * self.rng.standard_normal(self.K) / np.sqrt(self.n))}
        if law == "tau-tail":
            return {"target": self.target}
        if law == "tilt":
            return self._scores(gradients, w)
        if law == "receding":
            seen, error = self.noisy(gradients)
            if not self.noise and left < WINDOWS:
                self.recycled.follow(self.theta - self.before[0], list(gradients - self.before[1]))
            self.before = self.theta, gradients
            for _ in range(START if left == WINDOWS else left % 2):
                direction = self.recycled.direction(list(seen), w)
                if direction is not None:
                    self.recycled.add(direction, list(self.noisy(self.domains.A @ direction)[0]))
                    self.products += self.K
            self.model = self.recycled.model(list(seen), self.target, [0.0, left * self.h], error)
            self.law = functools.partial(receding, model=self.model, loss=float(self.target @ losses))
        return {}

    def _scores(self, gradients, w):
        """Scores and errors of four independent replicates that together carry the noise."""
        found = []
        for _ in range(4):
            u = self.noisy((self.target @ gradients)[None], 2.0)[0][0]
            h, g = self.noisy(self.domains.A @ u, 2.0)[0], self.noisy(gradients, 2.0)[0]
            found.append(bracket.scores(bracket.pairwise(h @ g.T), w))
        self.products += self.K
        error = np.std(found, 0, ddof=1) / 2 if self.noise else np.full(self.K, 1e-300)
        return {"score": np.mean(found, 0), "score_se": error, "dof": 3}

    def loss(self, law):
        """Final target loss after all decisions of `law`."""
        rest, w = self.budget * WINDOWS, self.budget
        for left in range(WINDOWS, 0, -1):
            base = rest / rest.sum()
            w = base if left == 1 else self._decided(law, w, base, rest, left)
            self.theta = self.domains.flow(w)(self.theta, self.h)
            rest = np.maximum(rest - w, 0.0)
        return float(self.target @ self.domains.losses(self.theta))

    def _decided(self, law, w, base, rest, left):
        K = self.K
        given = {"score": np.zeros(K), "score_se": np.full(K, np.inf), "dof": 3} | self.signals(
            law, base, left
        )
        situation = Situation(
            weights=w, remaining=rest * GRAIN, initial=self.budget, samples_left=left * GRAIN, window=GRAIN,
            minimum=np.zeros(K), maximum=np.ones(K), floors=np.zeros(K), caps=np.ones(K), rate=1.0, confidence=0.95,
            strength=0.5 if law == "tilt" else 1.0, cooldown=0, memory=self.memory, **given,
        )  # fmt: skip
        found = decide(self.law if law == "receding" else law, situation)
        self.memory = found.memory
        return nearest(w if found.weights is None else found.weights, np.zeros(K), np.minimum(rest, 1.0))


def cells(axes, times, noise):
    """(axis, time, budgets, noise level) of a study."""
    for axis, level in itertools.product(axes, noise):
        yield from ((axis, time, budgets, level) for time in times for budgets in BUDGETS)


def measured(task):
    """One row of FIELDS; task: (cell, law, seeds). A cell without a cached optimum has no share."""
    (axis, time, budgets, level), law, seeds = task
    optima, share, harm, products = cached({axis}), [], [], []
    for seed in range(seeds):
        run, line = Run(axis, time, budgets, level, seed), optima.get((axis, time, budgets, seed))
        loss = run.loss(law)
        products.append(run.products / WINDOWS)
        constant = line["constant"] if line else Run(axis, time, budgets, 0.0, seed).loss("hold")
        harm.append(100 * (loss / constant - 1))
        share.append(100 * (constant - loss) / (constant - line["optimum"]) if line else np.nan)
    told = float(np.median(share)), float(min(share)), max(harm), float(np.mean(products))
    print(axis, time, budgets, level, law, *(f"{x:.3g}" for x in told), file=sys.stderr, flush=True)
    return dict(zip(FIELDS, (axis, time, budgets, level, law, seeds, *told), strict=True))


def study(wanted, seeds, jobs):
    """The rows of all cells and laws as they are done, in `jobs` processes."""
    tasks = [(cell, law, seeds) for cell in wanted for law in LAWS]
    if jobs == 1:
        yield from map(measured, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(measured, tasks)


def write(path, rows):
    """Rows in the order axis, noise, flow time, budgets, law."""
    axes = list(AXES)
    rows = sorted(
        rows,
        key=lambda r: (axes.index(r["axis"]), r["noise"], r["time"], r["budgets"], LAWS.index(r["law"])),
    )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        lines = ({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        writer.writerows(lines)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    started = clock.perf_counter()
    if asked.quick:
        wanted, seeds = list(cells(["base"], (1.0, 16.0), (0.0, 0.3))), 2
    else:
        others = [axis for axis in AXES if axis != "base"]
        wanted, seeds = [*cells(["base"], TIMES, NOISE), *cells(others, TIMES, (0.0, 0.3))], SEEDS
    asked.out.mkdir(parents=True, exist_ok=True)
    path, rows = asked.out / ("decisions_quick.csv" if asked.quick else "decisions.csv"), []
    for row in study(wanted, seeds, asked.jobs):
        rows = write(path, [*rows, row])  # at every row: a study that is stopped keeps what it measured
    print(f"{clock.perf_counter() - started:.0f} s, {seeds} seeds, {WINDOWS} decisions a run")


if __name__ == "__main__":
    main()
