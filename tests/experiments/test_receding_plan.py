"""Planning against the flow of the quadratic experiment, finite differences and a general constrained solver."""

import numpy as np
import pytest
from scipy.linalg import expm

from megatron_commute.experiments import quadratic_domains, quadratic_search, receding_plan


def small(seed=0, n=6, domains=3):
    problem, theta = quadratic_domains.sample(seed, n=n, domains=domains, base=0.8)
    target = np.random.default_rng(seed).dirichlet(np.ones(domains))
    return problem, theta, receding_plan.Quadratic(H=problem.A, g=problem.gradients(theta), target=target)


@pytest.mark.parametrize("time", [0.05, 1.0, 40.0, 900.0])
def test_the_change_of_the_loss_is_that_of_matrix_exponentials(time):
    """Also where a window is longer than one Taylor step can reach."""
    problem, theta, model = small()
    times = time * np.array([0.2, 0.5, 0.3])
    w = np.random.default_rng(1).dirichlet(np.ones(3), 3)
    at = np.append(theta, 1.0)
    for weights, h in zip(w, times, strict=True):
        generator = np.zeros((7, 7))
        generator[:6, :6] = -np.tensordot(weights, problem.A, 1)
        generator[:6, 6] = np.einsum("k,kij,kj->i", weights, problem.A, problem.b)
        at = expm(generator * h) @ at
    expected = model.target @ (problem.losses(at[:6]) - problem.losses(theta))
    assert receding_plan.loss_change(model, w, times) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_the_gradient_is_that_of_differences_also_in_a_batch():
    models = [small(seed)[2] for seed in range(2)]
    batch = receding_plan.Quadratic(
        **{name: np.stack([getattr(m, name) for m in models]) for name in ("H", "g", "target")}
    )
    w = np.random.default_rng(2).dirichlet(np.ones(3), (2, 4))
    times = np.array([[0.3, 2.0, 1.0, 0.1], [1.0, 1.0, 5.0, 0.5]])
    change, gradient = receding_plan.loss_gradient(batch, w, times)
    np.testing.assert_allclose(change, receding_plan.loss_change(batch, w, times), rtol=1e-12)
    for index in np.ndindex(2, 4, 3):
        step = np.zeros_like(w)
        step[index] = 1e-5
        ends = [receding_plan.loss_change(batch, w + sign * step, times)[index[0]] for sign in (1, -1)]
        assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("sharp", [1.0, 0.05])
def test_every_plan_keeps_every_budget_to_the_last_digit(sharp):
    """Also plans of nearly pure windows, where scaling alone leaves budgets overdrawn by a fifth of a window."""
    rng = np.random.default_rng(3)
    w = rng.dirichlet(np.full(3, sharp), (5, 20)) + 1e-9
    sizes = rng.uniform(0.5, 3.0, 20)
    rest = rng.dirichlet(np.ones(3), 5) * sizes.sum()
    found = receding_plan.spread(w, sizes, rest)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-12)
    np.testing.assert_allclose(np.matmul(sizes, found), rest, atol=1e-11)
    assert (found >= 0).all()
    fixed = receding_plan.spread(found + 1e-15, sizes, rest)
    np.testing.assert_allclose(fixed, found, atol=1e-9)


@pytest.mark.parametrize("budgets", [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("time", [1.0, 8.0])
def test_descent_comes_near_a_general_solver(time, budgets):
    problem, theta, model = small(4, n=8)
    steps, budgets = 10, np.array(budgets)
    times, sizes = np.full(steps, time / steps), np.ones(steps)
    start = np.tile(budgets, (steps, 1))
    w, value, _ = receding_plan.descend(model, start, times, sizes, budgets * steps, 60)
    now = model.target @ problem.losses(theta)
    best = quadratic_search.search(problem, theta, budgets, time, steps, model.target)[1] - now
    constant = receding_plan.loss_change(model, start, times)
    assert value == pytest.approx(receding_plan.loss_change(model, w, times), rel=1e-12)
    assert constant - value > 0.9 * (constant - best) > 0
    np.testing.assert_allclose(w.sum(0), budgets * steps, atol=1e-9)


def test_what_is_measured_with_noise_is_nearer_the_truth_after_shrinking():
    """Mean squared errors over 40 draws, H of rank 3 in 20 coordinates; noise alone leaves next to nothing, none at all
    leaves everything. Seeded; the margins are ten standard errors wide."""
    rng, n, s = np.random.default_rng(5), 20, 0.05
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.where(np.arange(n) < 3, [3.0, 2.0, 1.5, *np.zeros(n - 3)], 0.0)
    H = (basis * values) @ basis.T
    H_se, g_se = np.full((1, n, n), s), np.full((1, n), 10 * s)
    errors = []
    for _ in range(40):
        g = H @ rng.standard_normal(n)
        noise = np.tril(rng.standard_normal((n, n)))
        seen = receding_plan.Quadratic(
            H=(H + s * (noise + np.tril(noise, -1).T))[None],
            g=(g + 10 * s * rng.standard_normal(n))[None],
            target=np.ones(1),
        )
        found = receding_plan.shrunk(seen, H_se, g_se)
        errors.append(
            [((m.H[0] - H) ** 2).sum() for m in (seen, found)]
            + [((m.g[0] - g) ** 2).sum() for m in (seen, found)]
        )
    raw_H, shrunk_H, raw_g, shrunk_g = np.mean(errors, 0)
    assert raw_H == pytest.approx(n**2 * s**2, rel=0.1)
    assert shrunk_H < 0.5 * raw_H and shrunk_g < 0.5 * raw_g
    empty = receding_plan.Quadratic(H=seen.H - H, g=seen.g - g, target=np.ones(1))
    rest = receding_plan.shrunk(empty, H_se, g_se)
    assert (rest.H**2).sum() < 0.05 * (empty.H**2).sum() and (rest.g**2).sum() < 0.5 * (empty.g**2).sum()
    exact = receding_plan.Quadratic(H=H[None], g=g[None], target=np.ones(1))
    same = receding_plan.shrunk(exact, 0 * H_se, 0 * g_se)
    np.testing.assert_allclose(same.H, exact.H, atol=1e-12)
    np.testing.assert_allclose(same.g, exact.g, atol=1e-12)
