"""Planning on a small quadratic model: the target loss at the end under weights piece by piece, its exact gradient, and a
descent over all schedules that keep the budgets.

In r coordinates (orthonormal, origin at the parameters of now) domain k has the slope g_k and the Hessian H_k; training
follows d' = -sum_k w_k (g_k + H_k d). Every array may carry the same leading batch shape "..."; M segments have the lengths
`times` f64[..., M] (flow time: learning rate x steps) and `sizes` f64[M] (samples), the first being the coming window.

Method: receding-horizon control with the flow's own adjoint (Pontryagin), budgets by entropic projection (Sinkhorn).
"""

import dataclasses
import functools

import numpy as np

NODES = np.array([0.5 - np.sqrt(0.15), 0.5, 0.5 + np.sqrt(0.15)])  # Gauss-Legendre on [0, 1]
NODE_WEIGHTS = np.array([5, 8, 5]) / 18
REACH = 2.0  # flow time x largest curvature of one Taylor step
ORDERS = ((0.03, 5), (0.1, 6), (0.3, 8), (0.7, 10), (1.2, 12), (REACH, 15))  # Taylor terms for 1e-8
SMALLEST = 1e-9  # a weight below this cannot grow again under multiplicative steps


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """H f64[..., K, r, r] symmetric, g f64[..., K, r], target f64[..., K] (shares of the target loss)."""

    H: np.ndarray
    g: np.ndarray
    target: np.ndarray

    @functools.cached_property
    def of_target(self):
        """(slope f64[..., r], Hessian f64[..., r, r]) of the target."""
        share = self.target[..., None, :]
        return np.matmul(share, self.g)[..., 0, :], weighted(share, self.H)[..., 0, :, :]

    @functools.cached_property
    def top(self):
        """The largest curvature of any domain in the whole batch."""
        return float(np.abs(np.linalg.eigvalsh(self.H)).max()) if self.H.size else 0.0

    def change(self, d):
        """Target loss at d f64[..., r] minus that at 0, in the units of the losses."""
        slope, curvature = self.of_target
        return ((slope + 0.5 * times_vector(curvature, d)) * d).sum(-1)


def times_vector(A, x):
    """A[..., r, r] x[..., r]."""
    return np.matmul(A, x[..., None])[..., 0]


def weighted(w, H):
    """sum_k w[..., M, k] H[..., k, r, r] as [..., M, r, r]."""
    r = H.shape[-1]
    flat = np.matmul(w, H.reshape(*H.shape[:-2], r * r))
    return flat.reshape(*flat.shape[:-1], r, r)


def pieces(model, times):
    """(substeps of every segment, Taylor order) with which the flow is accurate to 1e-8 of itself."""
    longest = times.reshape(-1, times.shape[-1]).max(0) * model.top
    parts = np.maximum(np.ceil(longest / REACH), 1).astype(int)
    reach = float((longest / parts).max())
    return parts, next(order for limit, order in ORDERS if reach <= limit * (1 + 1e-9))


def taylor(A, first, h, order, offset):
    """Terms [..., order, r] of a power series with x_0 = first and x_j = -h A x_(j-1) / (j + offset)."""
    terms = np.empty((*first.shape[:-1], order, first.shape[-1]))
    terms[..., 0, :] = first
    step = -h[..., None] * A
    product = np.dot if A.ndim == 2 else times_vector  # dot has a third of matmul's overhead
    for j in range(1, order):
        terms[..., j, :] = product(step, terms[..., j - 1, :]) / (j + offset)
    return terms


def advance(model, w, times, parts, order, keep=False):
    """(displacement f64[..., r] after all segments under w f64[..., M, K], displacements inside every substep if kept)."""
    A, c = weighted(w, model.H), np.matmul(w, model.g)
    d, inside = np.zeros(c.shape[:-2] + c.shape[-1:]), []
    powers = np.append(NODES, 1.0)[:, None] ** np.arange(1, order + 1)
    for m in range(w.shape[-2]):
        h = times[..., m, None] / parts[m]
        for _ in range(parts[m]):
            terms = taylor(
                A[..., m, :, :], -h * (c[..., m, :] + times_vector(A[..., m, :, :], d)), h, order, 1
            )
            if keep:
                at = d[..., None, :] + np.matmul(powers, terms)
                inside.append(at[..., :3, :])
                d = at[..., 3, :]
            else:
                d = d + terms.sum(-2)
    return d, inside


def loss_change(model, w, times):
    """Change f64[...] of the target loss from now to the end under w f64[..., M, K]."""
    return model.change(advance(model, w, times, *pieces(model, times))[0])


def loss_gradient(model, w, times):
    """(change of the target loss f64[...], its gradient f64[..., M, K] by the exact adjoint) under w f64[..., M, K]."""
    parts, order = pieces(model, times)
    d, inside = advance(model, w, times, parts, order, keep=True)
    slope, curvature = model.of_target
    adjoint = slope + times_vector(curvature, d)
    A, gradient = weighted(w, model.H), np.zeros(w.shape)
    powers = (1 - np.append(NODES, 0.0))[:, None] ** np.arange(order)
    for m in range(w.shape[-2] - 1, -1, -1):
        h = times[..., m, None] / parts[m]
        for _ in range(parts[m]):
            back = np.matmul(powers, taylor(A[..., m, :, :], adjoint, h, order, 0))
            adjoint = back[..., 3, :]
            slopes = model.g[..., :, None, :] + np.matmul(inside.pop()[..., None, :, :], model.H)
            gradient[..., m, :] -= h * ((slopes * back[..., None, :3, :]).sum(-1) @ NODE_WEIGHTS)
    return model.change(d), gradient


def spread(w, sizes, rest, rounds=12):
    """w f64[..., M, K] > 0 scaled (Sinkhorn), then rounded so that every segment sums to one and domain k uses exactly
    rest f64[..., K] samples; sizes f64[M] sum to the samples left.

    The rounding (Altschuler, Weed & Rigollet 2017, algorithm 2) matters: scaling alone converges slowly near pure segments,
    and a plan that overdraws a budget by little already promises a gain that is not there.
    """
    for _ in range(rounds):
        w = w * (rest / np.maximum(np.matmul(sizes, w), 1e-300))[..., None, :]
        w = w / np.maximum(w.sum(-1, keepdims=True), 1e-300)
    w = w * np.minimum(rest / np.maximum(np.matmul(sizes, w), 1e-300), 1.0)[..., None, :]
    owed = np.maximum(rest - np.matmul(sizes, w), 0.0)
    lacking = np.maximum(1.0 - w.sum(-1), 0.0)
    total = np.maximum(owed.sum(-1), 1e-300)
    return w + lacking[..., :, None] * (owed / total[..., None])[..., None, :]


def descend(model, w, times, sizes, rest, rounds, pace=None):
    """(weights, change of the target loss, pace) after `rounds` of mirror descent from w f64[..., M, K].

    A round multiplies by exp(-pace x centred gradient / its largest entry), puts the budgets right and is kept only where it
    lowers the loss; pace f64[...] grows and shrinks with success and may be handed to the next call.
    """
    value, gradient = loss_gradient(model, w, times)
    pace = np.ones(value.shape) if pace is None else np.maximum(pace, 0.05)
    scale = sizes[:, None]  # the gradient per sample, so that segments of any length move alike
    for _ in range(rounds):
        slope = gradient / scale
        slope = slope - np.average(slope, axis=-2, weights=sizes)[..., None, :]
        slope = slope - (slope * w).sum(-1, keepdims=True)
        largest = np.abs(slope).max((-1, -2), keepdims=True) + 1e-300
        step = np.exp(-pace[..., None, None] * slope / largest)
        tried = spread(np.maximum(w, SMALLEST) * step, sizes, rest)
        found, slopes = loss_gradient(model, tried, times)
        better = found < value
        w, gradient = (np.where(better[..., None, None], a, b) for a, b in ((tried, w), (slopes, gradient)))
        value = np.where(better, found, value)
        pace = np.clip(np.where(better, pace * 1.4, pace * 0.4), 1e-5, 50.0)
    return w, value, pace
