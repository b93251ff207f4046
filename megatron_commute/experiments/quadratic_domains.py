"""Quadratic domains: losses, gradients and exact flows, and the random problems of the paper's
appendix B.

L_k(theta) = (theta - b_k)' A_k (theta - b_k) / 2, so g_k = A_k (theta - b_k), H_k = A_k, and under
constant weights the flow theta' = -sum_k w_k g_k - c theta is a matrix exponential: nothing is
integrated numerically.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic:
    """K quadratic domains in n dimensions."""

    A: np.ndarray
    # f64[K, n, n], symmetric
    b: np.ndarray
    # f64[K, n], where each loss is least

    def gradients(self, theta):
        """g[..., K, n] at theta[..., n]."""
        return np.stack([(theta - b) @ A for A, b in zip(self.A, self.b, strict=True)], -2)

    def losses(self, theta):
        """L[..., K] at theta[..., n]."""
        offset = theta[..., None, :] - self.b
        return 0.5 * np.einsum("...ki,...ki->...k", offset, self.gradients(theta))

    def measure(self, theta, direction):
        """M[K, K] and u_g[K] of `bracket` at theta[n] and direction[n]: M[k, j] = (A_k u) . g_j."""
        g = self.gradients(theta)
        return (self.A @ direction) @ g.T, g @ direction

    def flow(self, weights, decay=0.0):
        """The exact flow under constant weights[K] and decay: a function (theta[..., n], time) ->
        theta.
        """
        A = np.tensordot(weights, self.A, 1)
        pull = np.einsum("k,kij,kj->i", weights, self.A, self.b)
        rates, basis = np.linalg.eigh(A + decay * np.eye(len(pull)))

        def advance(theta, time):
            slope = (theta @ A.T + decay * theta - pull) @ basis
            return theta - (slope * growth(rates, time)) @ basis.T

        return advance

    def pull_back(self, weights, decay=0.0):
        """The adjoint of `flow`: a function (lambda[n] after a window, time) -> lambda before it,
        exactly.
        """
        A = np.tensordot(weights, self.A, 1)
        rates, basis = np.linalg.eigh(A + decay * np.eye(len(A)))
        return lambda after, time: ((after @ basis) * np.exp(-rates * time)) @ basis.T


def quadratic(A, b):
    """Quadratic of arrays A[K, n, n], whose symmetric part counts, and b[K, n]; ValueError if the
    shapes disagree.
    """
    A, b = np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if b.ndim != 2 or A.shape != (*b.shape, b.shape[1]):
        raise ValueError(f"A has shape {A.shape} and b {b.shape}: pass A[K, n, n] and b[K, n]")
    return Quadratic(A=(A + A.swapaxes(1, 2)) / 2, b=b)


def sample(seed, n=100, domains=2, base=0.7, scale=1.0, spectrum=None, shared=False):
    """The paper's random problem (appendix B): (Quadratic, theta0[n]).

    A_k = C_k' diag(scale * base^j) C_k, C_k uniform on the orthogonal matrices; b_k, theta0
    standard normal. spectrum f64[n] in place of scale * base^j; shared: one C for all domains,
    whose spectra differ by log-normal factors (sigma 0.5).
    """
    rng = np.random.default_rng(seed)
    spectrum = scale * base ** np.arange(n) if spectrum is None else np.asarray(spectrum, dtype=np.float64)
    A = []
    for domain in range(domains):
        if domain == 0 or not shared:
            q, r = np.linalg.qr(rng.standard_normal((n, n)))
            q *= np.sign(np.diag(r))  # without this the law of q depends on the QR routine
        own = spectrum
        if shared:
            own = spectrum * np.exp(0.5 * rng.standard_normal(n))
            own *= spectrum.max() / own.max()
        A.append((q.T * own) @ q)
    b, theta0 = rng.standard_normal((domains, n)), rng.standard_normal(n)
    return quadratic(np.array(A), b), theta0


def growth(rates, time):
    """(1 - exp(-rate time)) / rate, also for rates of zero."""
    small = np.abs(rates * time) < 1e-12
    return np.where(small, time, -np.expm1(-rates * time) / np.where(small, 1.0, rates))
