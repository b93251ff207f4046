"""The small model and its plans: exact where it must be, the same for any kind of vector, quiet where it knows nothing."""

import dataclasses
import json

import numpy as np
import pytest
from situations import situation

from megatron_commute.experiments import quadratic_domains, receding, receding_law, receding_plan

TARGET = np.full(3, 1 / 3)


def learned(columns, seed=0, n=12, noise=0.0, width=24, completed=12):
    """(problem, theta, Recycled with `columns` directions, gradients as measured)."""
    problem, theta = quadratic_domains.sample(seed, n=n, domains=3, base=0.8)
    rng = np.random.default_rng(seed)

    def measured(rows):
        size = noise * np.linalg.norm(rows, axis=1, keepdims=True) / np.sqrt(n)
        return list(rows + size * rng.standard_normal(rows.shape))

    recycled = receding.Recycled(3, width=width, completed=completed)
    gradients = measured(problem.gradients(theta))
    for _ in range(columns):
        direction = recycled.direction(gradients, TARGET)
        if direction is not None:
            recycled.add(direction, measured(problem.A @ direction))
    return problem, theta, recycled, gradients


def even(model, steps=8, rest=(2, 3, 3)):
    return receding_law.propose(
        model, np.full(steps, model.clock[-1] / steps), np.ones(steps), np.array(rest, dtype=float)
    )


def test_with_a_full_basis_the_model_is_the_problem():
    problem, theta, recycled, gradients = learned(40)
    assert len(recycled.basis) == 12
    assert recycled.direction(gradients, TARGET) is None
    model = recycled.model(gradients, TARGET, [0.0, 4.0])
    w, times = np.random.default_rng(1).dirichlet(np.ones(3), 5), np.full(5, 0.8)
    exact = receding_plan.Quadratic(H=problem.A, g=problem.gradients(theta), target=TARGET)
    assert receding_plan.loss_change(model.full, w, times) == pytest.approx(
        receding_plan.loss_change(exact, w, times), rel=1e-9
    )
    assert not model.noisy


def test_on_its_basis_a_model_has_the_true_curvature_and_it_is_never_negative_there():
    problem, _, recycled, gradients = learned(5, n=20)
    model = recycled.model(gradients, TARGET, [0.0, 1.0])
    V = np.array(recycled.basis)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(model.full.H[:, :5, :5], V @ problem.A @ V.T, atol=1e-10)
    np.testing.assert_allclose(model.full.g[:, :5], np.array(gradients) @ V.T, atol=1e-12)
    assert np.linalg.eigvalsh(model.full.H).min() > -1e-9


def test_a_plan_gains_what_it_expects_when_the_model_is_the_problem():
    problem, theta, recycled, gradients = learned(40)
    found = even(recycled.model(gradients, TARGET, [0.0, 4.0]))
    assert found.active and found.expected < 0 and found.error < 0.01 * -found.expected
    exact = receding_plan.Quadratic(H=problem.A, g=problem.gradients(theta), target=TARGET)
    times, constant = np.full(8, 0.5), np.tile([0.25, 0.375, 0.375], (8, 1))
    gain = receding_plan.loss_change(exact, found.plan, times) - receding_plan.loss_change(
        exact, constant, times
    )
    assert gain == pytest.approx(found.expected, rel=1e-6)
    assert receding_plan.loss_change(exact, constant, times) == pytest.approx(found.constant, rel=1e-9)
    np.testing.assert_allclose(found.plan.sum(0), [2, 3, 3], atol=1e-9)


def test_where_the_models_disagree_or_noise_is_large_nothing_is_done():
    """Ten problems, products and gradients three times as noisy as long: no proposal may act on more than one."""
    acted = 0
    for seed in range(10):
        _, _, recycled, gradients = learned(8, seed, n=30, noise=3.0)
        size = 3.0 * np.linalg.norm(gradients, axis=1) / np.sqrt(30) / np.sqrt(10)
        found = even(recycled.model(gradients, TARGET, [0.0, 1.0], size), rest=(8 / 3, 8 / 3, 8 / 3))
        acted += bool(found.active)
        if not found.active:
            np.testing.assert_allclose(found.wish, TARGET)
    assert acted <= 1
    _, _, recycled, gradients = learned(8, n=30)
    model = recycled.model(gradients, TARGET, [0.0, 4.0])
    other = dataclasses.replace(model.lean, g=-100 * model.lean.g)
    assert not even(dataclasses.replace(model, lean=other)).active


def test_a_plan_begins_above_its_error_and_above_the_gate_and_is_then_carried_out():
    """1.96 errors of 0.01 and, before it has begun, 5e-4 of a loss of 3 nats."""
    shares = np.array([0.5, 0.5])

    def why(expected, loss=3.0, acting=False):
        found = receding_law.Proposal(shares, True, expected, 0.01, 0.0, shares, shares)
        return receding_law.doubt(found, loss, 0.95, acting)

    assert why(-0.2) is None and why(-0.2, loss=399.0) is None
    assert "inside its error" in why(-0.019) and "inside its error" in why(float("nan"))
    assert "below 0.0005 of the loss" in why(-0.2, loss=401.0)
    assert why(-0.2, loss=401.0, acting=True) is None


def test_receding_keeps_its_plan_as_json_and_goes_on_from_it():
    _, _, recycled, gradients = learned(12)
    model = recycled.model(gradients, np.full(3, 1 / 3), [0.0, 4.0])
    given = situation((0.4, 0.3, 0.3), score=(0, 0, 0))
    first = receding_law.receding(given, model, 5.0)
    memory = json.loads(json.dumps(first.memory))
    assert np.shape(memory["plan"]) == (10, 3) and sum(memory["sizes"]) == pytest.approx(1000)
    assert first.active and memory["acting"]
    np.testing.assert_allclose(np.array(memory["plan"]).sum(0) * 100, [400, 300, 300], atol=1e-4)
    later = receding_law.continued(memory, np.full(9, 100.0), 3)
    np.testing.assert_allclose(later, memory["plan"][1:], atol=1e-9)
    assert receding_law.continued({}, np.full(9, 100.0), 3) is None
    assert receding_law.continued(memory, np.full(12, 100.0), 3) is None, (
        "a plan for less than what is left is dropped"
    )
