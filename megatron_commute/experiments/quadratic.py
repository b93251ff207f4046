"""The paper's toy example (Rukhovich et al., arXiv 2501.15556, section 4.1) with exact flows.

`run` trains quadratic domains under a schedule with budgets; `study` is the command
`megatron-commute quadratic`: the paper's table, figures and errata, measured.
"""

from __future__ import annotations

import dataclasses
import functools
import time as clock
from pathlib import Path

import numpy as np

from megatron_commute import bracket
from megatron_commute.decide.controller import decide
from megatron_commute.decide.laws import tilted
from megatron_commute.decide.situation import Situation
from megatron_commute.experiments import (
    quadratic_errata,
    quadratic_figures,
    quadratic_readings,
    quadratic_search,
    quadratic_tables,
    quadratic_text,
)
from megatron_commute.experiments.quadratic_domains import quadratic
from megatron_commute.experiments.receding import Recycled
from megatron_commute.experiments.receding_law import receding
from megatron_commute.feasible import nearest

TILT_STRENGTH = 0.5  # of the law `tilt`; larger is worse over long horizons
START, GRAIN = 12, 1000  # directions multiplied at the first decision; samples that one step stands for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What `run` has done."""

    weights: np.ndarray
    # f64[steps, K], as used
    theta: np.ndarray
    # f64[n], at the end
    losses: np.ndarray
    # f64[K], at the end
    loss: float
    # the target's, at the end


def run(A, b, theta0, budgets, time, steps, target, schedule):
    """Trains for flow time `time` in `steps` equal steps, each an exact flow under its own weights.

    A[K, n, n], b[K, n], theta0[n]; budgets[K]: fractions of the run, summing to 1; target[K]: the
    final loss is target . L. schedule: "constant" (weights = budgets), "tilt" (the paper's
    criterion as a law, local direction), "commute" (the law `receding`: at most K + 1 exact
    Hessian-vector products a decision on average, no oracle), or weights f64[steps, K] whose
    columns sum to budgets * steps. ValueError names what does not fit.
    """
    problem = quadratic(A, b)
    theta, budgets, target = (np.asarray(x, dtype=np.float64) for x in (theta0, budgets, target))
    _check(problem, theta, budgets, time, steps, target)
    choose = _weights_of(schedule, problem, budgets, time, steps, target)
    used = np.empty((steps, len(budgets)))
    remaining = budgets * steps
    for step in range(steps):
        used[step] = choose(step, theta, remaining)
        remaining = np.maximum(remaining - used[step], 0.0)
        theta = problem.flow(used[step])(theta, time / steps)
    losses = problem.losses(theta)
    return Run(weights=used, theta=theta, losses=losses, loss=float(target @ losses))


def study(out_dir, seeds=300):
    """Everything `megatron-commute quadratic` shows: CSV and PNG go to out_dir, the dict returned
    has it all.

    Keys: table1, readings, one_problem, errata, full_loss, corollary (each a list of flat dicts,
    one a CSV row), text (the same for reading), files, seeds, seconds; JSON-able. `seeds` random
    problems; 300 take half a minute of one core.
    """
    started = clock.perf_counter()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    tables = {
        "table1": quadratic_tables.table1(seeds),
        "readings": quadratic_readings.readings(seeds),
        "one_problem": quadratic_readings.one_problem(seeds),
        "errata": quadratic_errata.errata(min(seeds, 100)),
        "full_loss": quadratic_tables.full_loss(min(seeds, 100)),
        "corollary": quadratic_search.corollary(max(1, min(seeds // 30, 10))),
    }
    files = [quadratic_tables.write_csv(out_dir / f"{name}.csv", rows) for name, rows in tables.items()]
    files += quadratic_figures.draw(out_dir, tables)
    text = quadratic_text.report(tables, seeds)
    seconds = clock.perf_counter() - started
    return {**tables, "text": text, "files": [str(f) for f in files], "seeds": seeds, "seconds": seconds}


def _check(problem, theta, budgets, time, steps, target):
    K, n = problem.b.shape
    for name, value, shape in (("theta0", theta, (n,)), ("budgets", budgets, (K,)), ("target", target, (K,))):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}: pass {shape} for {K} domains, {n} parameters")
    if (budgets < 0).any() or abs(budgets.sum() - 1) > 1e-9:
        raise ValueError(
            f"budgets {budgets.tolist()}: pass fractions of the run, none negative, summing to 1"
        )
    if not time > 0 or steps < 1:
        raise ValueError(f"time {time}, steps {steps}: pass a positive flow time and at least one step")


def _weights_of(schedule, problem, budgets, time, steps, target):
    """A function (step, theta, remaining[K]) -> weights[K] for a schedule of `run`."""
    if not isinstance(schedule, str):
        weights = np.asarray(schedule, dtype=np.float64)
        _check_schedule(weights, budgets, steps)
        return lambda step, theta, remaining: weights[step]
    if schedule == "constant":
        return lambda step, theta, remaining: budgets
    if schedule == "tilt":
        return lambda step, theta, remaining: _tilt(problem, theta, remaining, target)
    if schedule == "commute":
        return _Commute(problem=problem, budgets=budgets, time=time, steps=steps, target=target)
    raise ValueError(f"schedule {schedule!r}: pass 'constant', 'tilt', 'commute' or weights[steps, K]")


def _check_schedule(weights, budgets, steps):
    if weights.shape != (steps, len(budgets)):
        raise ValueError(f"schedule has shape {weights.shape}: pass weights[{steps}, {len(budgets)}]")
    if (weights < -1e-9).any() or np.abs(weights.sum(1) - 1).max() > 1e-6:
        raise ValueError("schedule: the weights of every step must be non-negative and sum to 1")
    spent = weights.sum(0)
    if np.abs(spent - budgets * steps).max() > 1e-6 * steps:
        raise ValueError(
            f"schedule spends {spent.tolist()} steps, the budgets are {(budgets * steps).tolist()}: "
            "make the column sums equal budgets * steps"
        )


class _Commute:
    """The law `receding` at every step: one new direction a decision, START at the first."""

    def __init__(self, *, problem, budgets, time, steps, target):
        self.problem, self.time, self.steps, self.target = problem, time, steps, target
        self.budgets, self.before = budgets, budgets
        self.recycled, self.memory = Recycled(len(budgets)), {}

    def __call__(self, step, theta, remaining):
        gradients, left = self.problem.gradients(theta), self.steps - step
        shares = remaining / remaining.sum()
        if left == 1:
            return shares
        for _ in range(START if step == 0 else 1):
            direction = self.recycled.direction(gradients, shares)
            if direction is not None:
                self.recycled.add(direction, list(self.problem.A @ direction))
        if not self.recycled.basis:
            return shares
        model = self.recycled.model(gradients, self.target, [0.0, self.time * left / self.steps])
        loss = float(self.target @ self.problem.losses(theta))
        law = functools.partial(receding, model=model, loss=loss)
        found = decide(law, self._situation(remaining, left))
        self.memory = found.memory
        wish = self.before if found.weights is None else found.weights
        self.before = nearest(wish, np.zeros_like(wish), np.minimum(remaining, 1.0))
        return self.before

    def _situation(self, remaining, left):
        """A step counts as GRAIN samples, so that the least change of a live run is far below a
        weight that matters.
        """
        K = len(self.budgets)
        return Situation(
            weights=self.before,
            remaining=remaining * GRAIN,
            initial=self.budgets,
            samples_left=left * GRAIN,
            window=GRAIN,
            score=np.zeros(K),
            score_se=np.full(K, np.inf),
            dof=1,
            minimum=np.zeros(K),
            maximum=np.ones(K),
            floors=np.zeros(K),
            caps=np.ones(K),
            rate=1.0,
            confidence=0.95,
            strength=1.0,
            memory=self.memory,
            cooldown=0,
        )


def _tilt(problem, theta, remaining, target):
    """Shares of the budgets left, tilted against local scores, never more than is left."""
    shares = remaining / remaining.sum()
    M, _ = problem.measure(theta, target @ problem.gradients(theta))
    scores = bracket.scores(bracket.pairwise(M), shares)
    wish = tilted(shares, scores, TILT_STRENGTH)
    return nearest(wish, np.zeros_like(wish), np.minimum(remaining, 1.0))
