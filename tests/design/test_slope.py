"""The paper's criterion, contracted with the adjoint, is the slope of the influence in flow time."""

import numpy as np

from megatron_commute import bracket


def test_on_quadratics_the_influence_falls_by_the_score():
    rng, K, n, rate, steps = np.random.default_rng(4), 3, 5, 1e-4, 4000
    roots = rng.normal(size=(K, n, n))
    A, b = roots @ roots.transpose(0, 2, 1) / n, rng.normal(size=(K, n))
    w, theta = np.array([0.5, 0.2, 0.3]), 3 * rng.normal(size=n)
    path, target = [theta], np.array([0.0, 1.0, 0.0])
    for _ in range(steps):
        path.append(path[-1] - rate * np.einsum("k,kij,kj->i", w, A, path[-1] - b))
    adjoint = np.einsum("k,kij,kj->i", target, A, path[-1] - b)
    J, s = np.zeros((steps, K)), np.zeros((steps, K))
    for t in range(steps - 1, -1, -1):
        gradients = np.einsum("kij,kj->ki", A, path[t] - b)
        J[t] = -gradients @ adjoint  # d target / d weight, per learning rate
        M = np.einsum("kij,j,li->kl", A, adjoint, gradients)
        s[t] = bracket.scores(bracket.pairwise(M), w)
        adjoint = adjoint - rate * np.einsum("k,kij,j->i", w, A, adjoint)
    slope = (J[2:] - J[:-2]) / (2 * rate)
    assert np.abs(slope + s[1:-1]).max() <= 1e-3 * np.abs(s).max()
