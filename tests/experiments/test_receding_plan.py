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
