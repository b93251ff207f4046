"""Searching over whole schedules with budgets, and Corollary 3.2(b) on what the search finds.

The loss at the end is differentiated through the exact flow: with the adjoint lambda (lambda' = H_w
lambda, from the target's gradient at the end), dL/dw_k in a step is -int lambda . g_k dt.
"""

from __future__ import annotations

import numpy as np

from megatron_commute import bracket
from megatron_commute.experiments.quadratic_domains import growth, sample

NODES, NODE_WEIGHTS = (np.polynomial.legendre.leggauss(4)[k] for k in range(2))
STEPS, TIME, DIMENSIONS = 24, 4.0, 12
ITERATIONS = 1000  # of SLSQP, at most
INTERIOR = 0.02  # a weight this far from 0 and 1 counts as mixed
SILENT = 0.05  # a gap below this part of the constant mixture's median gap counts as zero: steps are finite


def corollary(seeds):
    """Corollary 3.2(b) before and after the search, one row for 2 and 3 domains and each of `seeds`
    problems.

    gain_percent: of the constant mixture's final loss. mixed_*: share of (step, next step, pair)
    where both domains are mixed in both steps. gap_constant: median |s_i - s_j| over those,
    direction pulled back from the end; gap_found: the same for the found schedule, as a part of
    gap_constant. improvable_*: share of all where besides `bracket.improvable` holds. switches:
    turns from one pure domain to another; allowed and allowed_local: those that pass
    `bracket.may_switch` with the direction pulled back from the end (what the corollary is about
    here), and with the local gradient (what a checkpoint can see).
    """
    return [_row(*problem_of(seed, domains)) for domains in (2, 3) for seed in range(seeds)]


def problem_of(seed, domains):
    """(seed, Quadratic, theta0, budgets) of one row of `corollary`; the target is the budgets, all
    equal.
    """
    problem, theta0 = sample(seed, n=DIMENSIONS, domains=domains, base=0.8)
    return seed, problem, theta0, np.full(domains, 1 / domains)


def _row(seed, problem, theta0, budgets):
    constant = np.tile(budgets, (STEPS, 1))
    found, loss = search(problem, theta0, budgets, TIME, STEPS, budgets)
    before, _ = gradient(problem, theta0, constant, TIME, budgets)
    gaps = {}
    for name, weights in (("constant", constant), ("found", found)):
        brackets = trajectory(problem, theta0, weights, TIME, budgets)
        gaps[name] = mixed_gaps([pulled for pulled, _ in brackets], weights)
    typical = np.nanmedian(gaps["constant"])
    row = {"domains": len(budgets), "seed": seed, "constant": before, "found": loss}
    row["gain_percent"] = 100 * (1 - loss / before)
    row |= {f"mixed_{name}": float(np.isfinite(g).mean()) for name, g in gaps.items()}
    row |= {f"improvable_{name}": float((g > SILENT * typical).mean()) for name, g in gaps.items()}
    row["gap_constant"] = float(typical)
    arcs = gaps["found"][np.isfinite(gaps["found"])]
    row["gap_found"] = float(np.median(arcs) / typical) if arcs.size else 0.0
    turns = _switches(brackets, found, SILENT * typical)
    allowed, allowed_local = (sum(column) for column in zip(*turns, strict=True)) if turns else (0, 0)
    return row | {"switches": len(turns), "allowed": allowed, "allowed_local": allowed_local}


def constrained(objective, start, totals, iterations, tolerance):
    """scipy's SLSQP result for weights f64[M, K] in [0, 1] whose rows sum to 1 and whose columns
    sum to `totals` f64[K].

    objective: weights -> (value, slope f64[M, K]), of a size near 100; start: f64[M, K]. Dense in M
    * K.
    """
    from scipy.optimize import minimize

    M, K = start.shape
    matrix = np.vstack([np.kron(np.eye(M), np.ones(K)), np.kron(np.ones(M), np.eye(K))[:-1]])
    sums = np.concatenate([np.ones(M), totals[:-1]])

    def flat_objective(flat):
        value, slope = objective(flat.reshape(M, K))
        return float(value), slope.ravel()

    return minimize(
        flat_objective,
        start.ravel(),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * start.size,
        constraints={"type": "eq", "fun": lambda flat: matrix @ flat - sums, "jac": lambda flat: matrix},
        options={"maxiter": iterations, "ftol": tolerance},
    )


def search(problem, theta0, budgets, time, steps, target):
    """A schedule f64[steps, K] within the budgets whose end no small change lowers, and its final
    loss.

    Sequential quadratic programming (scipy's SLSQP) on the exact gradient, from the constant
    mixture: a local optimum. Dense in steps * K, so for up to a few hundred weights. RuntimeError
    where it does not converge.
    """
    K = len(budgets)
    start = np.tile(budgets, (steps, 1))
    scale = 100 / gradient(problem, theta0, start, time, target)[0]

    def objective(weights):
        loss, slope = gradient(problem, theta0, weights, time, target)
        return scale * loss, scale * slope

    found = constrained(objective, start, budgets * steps, ITERATIONS, 1e-13)
    if not found.success:
        raise RuntimeError(f"search stopped after {found.nit} iterations ({found.message}): raise ITERATIONS")
    return found.x.reshape(steps, K), found.fun / scale


def gradient(problem, theta0, weights, time, target):
    """Final loss, and its exact gradient f64[steps, K] with respect to the steps' weights
    f64[steps, K].
    """
    h = time / len(weights)
    rates, basis = np.linalg.eigh(np.tensordot(weights, problem.A, 1))
    pull = weights @ np.einsum("kij,kj->ki", problem.A, problem.b)
    at = h * (NODES + 1) / 2
    theta, inside = theta0, []
    for l, V, c in zip(rates, basis, pull, strict=True):
        slope = ((theta @ V) * l - c @ V)[None]
        inside.append(theta - (slope * growth(l, at[:, None])) @ V.T)
        theta = theta - (slope[0] * growth(l, h)) @ V.T
    adjoint = target @ problem.gradients(theta)
    total = np.empty_like(weights)
    for step in range(len(weights) - 1, -1, -1):
        l, V = rates[step], basis[step]
        after = adjoint @ V
        adjoints = (after * np.exp(-l * (h - at[:, None]))) @ V.T
        g = problem.gradients(inside[step])
        total[step] = -h / 2 * np.einsum("q,qn,qkn->k", NODE_WEIGHTS, adjoints, g)
        adjoint = (after * np.exp(-l * h)) @ V.T
    return float(target @ problem.losses(theta)), total


def trajectory(problem, theta0, weights, time, target):
    """(P pulled back from the end, P of the local gradient) after every step but the last."""
    h = time / len(weights)
    flows = [problem.flow(w) for w in weights]
    states = [theta0]
    for flow in flows:
        states.append(flow(states[-1], h))
    adjoint = target @ problem.gradients(states[-1])
    pairs = []
    for step in range(len(weights) - 1, 0, -1):
        adjoint = problem.pull_back(weights[step])(adjoint, h)
        theta = states[step]
        directions = adjoint, target @ problem.gradients(theta)
        pairs.append(tuple(bracket.pairwise(problem.measure(theta, u)[0]) for u in directions))
    return pairs[::-1]


def mixed_gaps(brackets, weights):
    """|s_i - s_j| for [step and its next, pair i > j]; NaN where a domain is not mixed in both
    steps.

    brackets: P[K, K] at each inner boundary of the steps; weights: f64[steps, K].
    """
    first, second = np.tril_indices(weights.shape[1], -1)
    gaps = np.empty((len(brackets), len(first)))
    for step, P in enumerate(brackets):
        around = weights[step : step + 2]
        s = bracket.scores(P, around.mean(0))
        free = [bracket.improvable(s, w, 0.0, INTERIOR, 1 - INTERIOR) for w in around]
        mixed = free[0] & free[1]
        gap = np.where(mixed, s[:, None] - s, np.nan)
        gaps[step] = np.fmax(gap[first, second], gap[second, first])
    return gaps


def _switches(brackets, weights, error):
    """(allowed pulled back, locally) for every turn from pure i to pure j, at most one mixed step
    between.
    """
    pure = np.where(weights.max(1) > 1 - INTERIOR, weights.argmax(1), -1)
    turns = []
    for step in range(1, len(weights)):
        before = pure[step - 1] if pure[step - 1] >= 0 else pure[max(step - 2, 0)]
        if min(before, pure[step]) < 0 or before == pure[step]:
            continue
        turns.append([bool(bracket.may_switch(P, error)[before, pure[step]]) for P in brackets[step - 1]])
    return turns
