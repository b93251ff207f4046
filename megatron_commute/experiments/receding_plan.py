"""Planning on a small quadratic model: the target loss at the end under weights piece by piece, its
exact gradient, and a descent over all schedules that keep the budgets.

In r coordinates (orthonormal, origin at the parameters of now) domain k has the slope g_k and the
Hessian H_k; training follows d' = -sum_k w_k (g_k + H_k d). Every array may carry the same leading
batch shape "..."; M segments have the lengths `times` f64[..., M] (flow time: learning rate x
steps) and `sizes` f64[M] (samples), the first being the coming window.

Method: receding-horizon control with the flow's own adjoint (Pontryagin), budgets by entropic
projection (Sinkhorn).
"""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import numpy as np

NODES = np.array([0.5 - np.sqrt(0.15), 0.5, 0.5 + np.sqrt(0.15)])  # Gauss-Legendre on [0, 1]
NODE_WEIGHTS = np.array([5, 8, 5]) / 18
REACH = 2.0  # flow time x largest curvature of one Taylor step
ORDERS = ((0.03, 5), (0.1, 6), (0.3, 8), (0.7, 10), (1.2, 12), (REACH, 15))  # Taylor terms for 1e-8
SMALLEST = 1e-9  # a weight below this cannot grow again under multiplicative steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic:
    """K losses around the parameters of now, in r coordinates."""

    H: np.ndarray
    # f64[..., K, r, r], symmetric
    g: np.ndarray
    # f64[..., K, r]
    target: np.ndarray
    # f64[..., K], shares of the target loss

    @functools.cached_property
    def of_target(self):
        """(slope f64[..., r], Hessian f64[..., r, r]) of the target."""
        share = self.target[..., None, :]
        return np.matmul(share, self.g)[..., 0, :], weighted(share, self.H)[..., 0, :, :]

    @functools.cached_property
    def top(self):
        """The largest curvature of any domain in the whole batch."""
        return float(np.abs(np.linalg.eigvalsh(self.H)).max()) if self.H.size else 0.0

    @functools.cached_property
    def generators(self):
        """G f64[..., K, r + 1, r + 1]: under weights w, (d, 1)' = -sum_k w_k G_k (d, 1)."""
        G = np.zeros((*self.g.shape[:-1], self.g.shape[-1] + 1, self.g.shape[-1] + 1))
        G[..., :-1, :-1], G[..., :-1, -1] = self.H, self.g
        return G

    def change(self, d):
        """Target loss at d f64[..., r] minus that at 0, in the units of the losses."""
        slope, curvature = self.of_target
        return ((slope + 0.5 * times_vector(curvature, d)) * d).sum(-1)


class Path(NamedTuple):
    """A flow as `forward` leaves it for `backward`; N: substeps of all segments together.

    steps f64[..., M, r + 1, r + 1]: -h G of a substep, h f64[..., M] its length; parts i64[M]:
    substeps of every segment; order: Taylor terms; inside f64[..., N, 4, r + 1]: (d, 1) at the
    nodes and at the end of every substep.
    """

    steps: np.ndarray
    h: np.ndarray
    parts: np.ndarray
    order: int
    inside: np.ndarray


def times_vector(A, x):
    """A[..., r, r] x[..., r]."""
    return np.matmul(A, x[..., None])[..., 0]


def weighted(w, H):
    """sum_k w[..., M, k] H[..., k, r, r] as [..., M, r, r]."""
    r = H.shape[-1]
    flat = np.matmul(w, H.reshape(*H.shape[:-2], r * r))
    return flat.reshape(*flat.shape[:-1], r, r)


def pieces(model, times):
    """(substeps of every segment, Taylor order) that make the flow accurate to 1e-8 of itself."""
    longest = times.reshape(-1, times.shape[-1]).max(0) * model.top
    parts = np.maximum(np.ceil(longest / REACH), 1).astype(int)
    reach = float((longest / parts).max())
    return parts, next(order for limit, order in ORDERS if reach <= limit * (1 + 1e-9))


def march(steps, parts, first, nodes, terms):
    """exp(node S) x f64[..., N, nodes, r] within every substep, S f64[r, r] of steps[..., M, r, r]
    applied parts[m] times.

    first f64[..., r]: x at the start; nodes f64[4], the last one 1: there the next substep begins;
    terms: of the series. Nearly all time of a plan is spent in the inner products here, so their
    rows are laid out once.
    """
    powers = nodes[:, None] ** np.arange(terms) / np.cumprod(np.maximum(np.arange(terms), 1.0))
    row = np.empty((terms, first.shape[-1]))
    pairs, dot, found = list(itertools.pairwise(row)), np.dot, []
    for x, segments in zip(
        first.reshape(-1, first.shape[-1]), steps.reshape(-1, *steps.shape[-3:]), strict=True
    ):
        row[0] = x
        for S, count in zip(segments, parts, strict=True):
            for _ in range(count):
                for before, after in pairs:
                    dot(S, before, after)
                found.append(dot(powers, row))
                row[0] = found[-1][-1]
    return np.reshape(found, (*steps.shape[:-3], -1, *found[0].shape))


def forward(model, w, times):
    """(change f64[...] of the target loss from now to the end under w f64[..., M, K], its Path)."""
    parts, order = pieces(model, times)
    h = times / parts
    steps = -h[..., None, None] * weighted(w, model.generators)
    start = np.zeros((*steps.shape[:-3], steps.shape[-1]))
    start[..., -1] = 1.0
    inside = march(steps, parts, start, np.append(NODES, 1.0), order + 1)
    return model.change(inside[..., -1, -1, :-1]), Path(steps, h, parts, order, inside)


def backward(model, path):
    """Gradient f64[..., M, K] of the change of the target loss, by the exact adjoint of the flow
    along `path`.
    """
    slope, curvature = model.of_target
    end, inside = path.inside[..., -1, -1, :-1], path.inside[..., :-1, :]
    last = np.zeros(path.inside[..., -1, -1, :].shape)
    last[..., :-1] = slope + times_vector(curvature, end)
    transposed = path.steps[..., ::-1, :, :].swapaxes(-1, -2)
    back = march(transposed, path.parts[::-1], last, np.append(1 - NODES, 1.0), path.order)
    back = back[..., ::-1, :-1, :]
    *batch, N, nodes, r = back.shape
    pulled = np.matmul(back.reshape(*batch, 1, N * nodes, r), model.generators)
    slopes = (pulled * inside.reshape(*batch, 1, N * nodes, r)).sum(-1)
    slopes = slopes.reshape(*slopes.shape[:-1], N, nodes) @ NODE_WEIGHTS
    slopes = np.add.reduceat(slopes, np.cumsum(path.parts) - path.parts, -1)
    return -path.h[..., None] * slopes.swapaxes(-1, -2)


def loss_change(model, w, times):
    """Change f64[...] of the target loss from now to the end under w f64[..., M, K]."""
    return forward(model, w, times)[0]


def loss_gradient(model, w, times):
    """(change of the target loss f64[...], its gradient f64[..., M, K] by the exact adjoint) under
    w f64[..., M, K].
    """
    change, path = forward(model, w, times)
    return change, backward(model, path)


def shrunk(model, H_se, g_se):
    """The Quadratic to expect where `model` was measured with standard errors H_se f64[K, r, r],
    g_se f64[K, r].

    Eigenvalues of H_k lose what noise adds to them (Gavish & Donoho 2017, Frobenius loss: sqrt(x^2
    - edge^2), none below the edge of pure noise); coordinates of g_k along its eigenvectors are
    Wiener-filtered with a signal in proportion to the squared eigenvalue, as it is where the
    minimum of domain k lies anywhere (g_k = H_k (theta - b_k), b_k isotropic).
    """
    values, vectors = np.linalg.eigh(model.H)
    noisy = np.maximum((H_se > 0).any(-1).sum(-1), 1)
    edge = 4 * (H_se**2).sum((-1, -2)) / noisy  # squared: coordinates x 4 x mean squared error
    values = np.sqrt(np.maximum(values**2 - edge[..., None], 0.0)) * (values > 0)
    along, noise = np.matmul(model.g[..., None, :], vectors)[..., 0, :], g_se**2
    power = np.maximum((along**2 - noise).sum(-1, keepdims=True), 0.0)
    power = power * values**2 / np.maximum((values**2).sum(-1, keepdims=True), 1e-300)
    along = along * np.where(noise > 0, power / np.maximum(power + noise, 1e-300), 1.0)
    H = (vectors * values[..., None, :]) @ vectors.swapaxes(-1, -2)
    return Quadratic(H=H, g=times_vector(vectors, along), target=model.target)


def spread(w, sizes, rest, rounds=12):
    """w f64[..., M, K] > 0 scaled (Sinkhorn), then rounded so that every segment sums to one and
    domain k uses exactly rest f64[..., K] samples; sizes f64[M] sum to the samples left.

    The rounding (Altschuler, Weed & Rigollet 2017, algorithm 2) matters: scaling alone converges
    slowly near pure segments, and a plan that overdraws a budget by little already promises a gain
    that is not there.
    """
    row = np.ones(w.shape[:-1])
    for _ in range(rounds):
        column = rest / np.maximum(np.matmul((sizes * row)[..., None, :], w)[..., 0, :], 1e-300)
        row = 1 / np.maximum(times_vector(w, column), 1e-300)
    if rounds:
        w = row[..., None] * w * column[..., None, :]
    w = w * np.minimum(rest / np.maximum(np.matmul(sizes, w), 1e-300), 1.0)[..., None, :]
    owed = np.maximum(rest - np.matmul(sizes, w), 0.0)
    lacking = np.maximum(1.0 - w.sum(-1), 0.0)
    total = np.maximum(owed.sum(-1), 1e-300)
    return w + lacking[..., :, None] * (owed / total[..., None])[..., None, :]


def descend(model, w, times, sizes, rest, rounds, pace=None):
    """(weights, change of the target loss, pace) after `rounds` of mirror descent from w f64[...,
    M, K].

    A round multiplies by exp(-pace x centred gradient / its largest entry), puts the budgets right
    and is kept only where it lowers the loss; pace f64[...] grows and shrinks with success and may
    be handed to the next call.
    """
    value, gradient = loss_gradient(model, w, times)
    pace = np.ones(value.shape) if pace is None else np.maximum(pace, 0.05)
    scale = sizes[:, None]  # the gradient per sample, so that segments of any length move alike
    for _ in range(rounds):
        slope = gradient / scale
        slope = slope - (np.matmul(sizes, slope) / sizes.sum())[..., None, :]
        slope = slope - (slope * w).sum(-1, keepdims=True)
        largest = np.abs(slope).max((-1, -2), keepdims=True) + 1e-300
        step = np.exp(-pace[..., None, None] * slope / largest)
        tried = spread(np.maximum(w, SMALLEST) * step, sizes, rest)
        found, path = forward(model, tried, times)
        better = found < value
        if better.any():
            keep = better[..., None, None]
            w, gradient = np.where(keep, tried, w), np.where(keep, backward(model, path), gradient)
            value = np.where(better, found, value)
        pace = np.clip(np.where(better, pace * 1.4, pace * 0.4), 1e-5, 50.0)
    return w, value, pace
