"""Tables of `megatron-commute quadratic`: the paper's Table 1 and the full prediction."""

from __future__ import annotations

import csv

import numpy as np

from megatron_commute import bracket
from megatron_commute.experiments.quadratic_domains import Quadratic, sample
from megatron_commute.settings import text_files

STARTS, WINDOWS = (0.1, 0.3, 1.0, 3.0), (0.001, 0.01, 0.1)
PRINTED = (  # the paper's Table 1: (ratio, +-) for every start (row) and window (column)
    ((0.997, 0.001), (0.972, 0.010), (0.763, 0.053)),
    ((0.997, 0.001), (0.973, 0.008), (0.766, 0.084)),
    ((0.997, 0.001), (0.974, 0.012), (0.774, 0.135)),
    ((0.998, 0.002), (0.979, 0.022), (0.834, 0.223)),
)
HALF = np.array([0.5, 0.5])


class Swap:
    """Two domains trained one after the other from theta[..., n], against their even mixture."""

    def __init__(self, problem: Quadratic):
        self.problem = problem
        self.mixture = problem.flow(HALF)
        self.first, self.second = (problem.flow(np.eye(2)[k]) for k in range(2))

    def excess(self, theta, window):
        """Excess losses (EL_12, EL_21) of the even mixture L after two windows of flow time
        `window` each.
        """
        base = self.mixture(theta, 2 * window)
        one_two = self.second(self.first(theta, window), window)
        two_one = self.first(self.second(theta, window), window)
        return self.difference(one_two, base), self.difference(two_one, base)

    def difference(self, theta, base):
        """L(theta) - L(base) without cancellation: for a quadratic it is step . gradient at the
        midpoint.
        """
        g = self.problem.gradients((theta + base) / 2).mean(-2)
        return np.einsum("...i,...i->...", theta - base, g)

    def bracket(self, theta):
        """P_12 of the even mixture at theta[..., n], in the sign of bracket.py."""
        g = self.problem.gradients(theta)
        h = np.stack([g.mean(-2) @ A for A in self.problem.A], -2)
        return bracket.pairwise(h @ g.swapaxes(-1, -2))[..., 0, 1]

    def ratio(self, theta, window):
        """Measured EL_12 over its prediction, the quantity of Table 1."""
        predicted = bracket.predicted_excess_loss(self.bracket(theta), 0.5, window)
        return self.excess(theta, window)[0] / predicted


def table1(seeds):
    """Twelve rows: start t, window dt, median, 10 and 90 % quantiles of measured over predicted;
    the paper's.

    One random problem a seed (matrices, minima and theta0). median_21: of -EL_21 over the same
    prediction.
    """
    cells = np.empty((seeds, len(STARTS), len(WINDOWS), 2))
    for seed in range(seeds):
        problem, theta0 = sample(seed)
        swap = Swap(problem)
        for i, start in enumerate(STARTS):
            theta = swap.mixture(theta0, start)
            for j, window in enumerate(WINDOWS):
                predicted = bracket.predicted_excess_loss(swap.bracket(theta), 0.5, window)
                one_two, two_one = swap.excess(theta, window)
                cells[seed, i, j] = one_two / predicted, -two_one / predicted
    rows = []
    for i, start in enumerate(STARTS):
        for j, window in enumerate(WINDOWS):
            printed, spread = PRINTED[i][j]
            row = {"t": start, "dt": window, **summary(cells[:, i, j, 0])}
            row["median_21"] = float(np.median(cells[:, i, j, 1]))
            rows.append(row | {"paper": printed, "paper_pm": spread})
    return rows


def full_loss(seeds):
    """Measured over predicted dL beyond the paper's case; predicted with the full score, and with s
    alone.

    Rows: 2, 3 and 8 domains, random weights, the pair of the largest predicted effect, direction
    read where the windows meet; plain, with weight decay 0.1, with a learning rate of 1.1 then 0.9,
    and with both.
    """
    rows = []
    for domains in (2, 3, 8):
        for decay, rates in ((0.0, (1.0, 1.0)), (0.1, (1.0, 1.0)), (0.0, (1.1, 0.9)), (0.1, (1.1, 0.9))):
            for window in WINDOWS:
                pairs = [_full(seed, domains, decay, rates, window) for seed in range(seeds)]
                full, plain = np.array(pairs).T
                row = {"domains": domains, "decay": decay, "rates": "{} then {}".format(*rates), "e": window}
                rows.append(row | summary(full) | {"with_s_alone": float(np.median(plain))})
    return rows


def _full(seed, domains, decay, rates, window):
    """Measured dL over the prediction of the full score, and of s alone, of one problem."""
    problem, theta = sample(seed, n=40, domains=domains, base=0.8)
    weights = np.random.default_rng([seed, 2]).dirichlet(np.full(domains, 3.0))
    times = tuple(rate * window for rate in rates)
    mixture = problem.flow(weights, decay)
    middle = mixture(theta, times[0])
    base = mixture(middle, times[1])
    end_gradient = problem.gradients(base).mean(0)
    direction = problem.pull_back(weights, decay)(end_gradient, times[1])
    M, u_g = problem.measure(middle, direction)
    h_theta = (problem.A @ direction) @ middle
    s = bracket.scores(bracket.pairwise(M), weights)
    score = bracket.full_score(s, u_g, h_theta, decay, times)
    i, j = int(score.argmax()), int(score.argmin())
    delta = min(weights[i], weights[j]) / 2
    shift = delta * (np.eye(domains)[i] - np.eye(domains)[j])
    half = problem.flow(weights + shift, decay)(theta, times[0])
    moved = problem.flow(weights - shift, decay)(half, times[1])
    measured = (moved - base) @ problem.gradients((moved + base) / 2).mean(0)
    time = bracket.window_time(*times)
    return [measured / bracket.predicted_excess_loss(x[i] - x[j], delta, time) for x in (score, s)]


def summary(values):
    """Median, 10 and 90 % quantiles and half of their distance, of values[m]."""
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {
        "median": float(middle),
        "q10": float(low),
        "q90": float(high),
        "half_range": float(high - low) / 2,
    }


def write_csv(path, rows):
    """Writes flat dicts of the same keys, one a line, numbers to six digits; returns the path."""
    with text_files.replacing(path) as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    return path
