"""The small model and its plans: exact where it must be, the same for any kind of vector, quiet where it knows nothing."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from situations import situation

from megatron_commute import ops
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
    exact = receding_plan.Quadratic(problem.A, problem.gradients(theta), TARGET)
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


def test_completion_foretells_a_product_better_than_the_basis_alone():
    """Median over seeds of the error of the loss at the end, against the exact model."""
    errors = []
    for seed in range(6):
        problem, _, recycled, gradients = learned(8, seed, n=30)
        w, times = np.tile(TARGET, (4, 1)), np.full(4, 1.0)
        exact = receding_plan.loss_change(
            receding_plan.Quadratic(problem.A, np.array(gradients), TARGET), w, times
        )
        found = recycled.model(gradients, TARGET, [0.0, 4.0]).full
        recycled.completed = 0
        alone = recycled.model(gradients, TARGET, [0.0, 4.0]).full
        errors.append([abs(receding_plan.loss_change(m, w, times) - exact) for m in (found, alone)])
    ours, plain = np.median(errors, 0)
    assert ours < 0.5 * plain


def test_lists_of_tensors_give_the_same_model_as_rows():
    problem, _, rows, gradients = learned(6)

    def split(vector):
        tensor = torch.tensor(vector)
        return [tensor[:5].reshape(5, 1), tensor[5:]]

    def combine(coefficients, X):
        return [sum(float(c) * x[i] for c, x in zip(coefficients, X, strict=True)) for i in range(2)]

    lists = receding.Recycled(3, dots=lambda X, Y: ops.gram(X, Y).numpy(), combine=combine)
    slopes = [split(g) for g in gradients]
    for _ in range(6):
        direction = lists.direction(slopes, TARGET)
        flat = torch.cat([t.reshape(-1) for t in direction]).numpy()
        lists.add(direction, [split(row) for row in problem.A @ flat])
    w, times = np.tile(TARGET, (3, 1)), np.full(3, 0.5)
    found, expected = (
        receding_plan.loss_change(r.model(g, TARGET, [0, 1.5]).full, w, times)
        for r, g in ((lists, slopes), (rows, gradients))
    )
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_the_noise_of_products_is_read_off_their_asymmetry(noise):
    """Entries of a product of length l carry noise l / sqrt(n) each, the length that of the noisy product; median over
    seeds, within a third: lengths of directions differ, and so does their noise."""
    n, found = 40, []
    for seed in range(12):
        _, _, recycled, _ = learned(12, seed, n=n, noise=noise)
        found.append(recycled.noise())
    assert np.median(found) * np.sqrt(n) == pytest.approx(noise / np.sqrt(1 + noise**2), rel=1 / 3)
    assert learned(12, n=n)[2].noise().max() < 1e-12


def test_what_is_least_curved_makes_room_and_products_stay_products():
    problem, _, recycled, gradients = learned(5, n=20, width=5)
    V, more = np.array(recycled.basis), recycled.direction(gradients, TARGET)
    recycled.add(more, list(problem.A @ more))
    kept = np.array(recycled.basis)
    assert kept.shape == (5, 20) and len(recycled.products) == 5
    np.testing.assert_allclose(kept @ kept.T, np.eye(5), atol=1e-12)
    for k in range(3):
        np.testing.assert_allclose([y[k] for y in recycled.products], kept @ problem.A[k], atol=1e-10)
    span = np.linalg.qr(np.vstack([V, more]).T)[0]
    curved = span.T @ np.einsum("kij,kjl->il", problem.A, problem.A) @ span
    np.testing.assert_allclose(kept @ span @ np.linalg.eigh(curved)[1][:, 0], 0, atol=1e-9)
    every = [vector for v, y in zip(recycled.basis, recycled.products, strict=True) for vector in (v, *y)]
    np.testing.assert_allclose(recycled._gram, receding.rows_dots(every, every), atol=1e-10)
    assert recycled.model(gradients, TARGET, [0.0, 1.0]).full.H.shape[1] > 5
    with pytest.raises(ValueError, match="add one direction"):
        receding.Recycled(3).model(gradients, TARGET, [0.0, 1.0])


def test_a_step_of_training_tells_the_products_along_it():
    problem, theta, recycled, _ = learned(4, n=20)
    step = np.random.default_rng(7).standard_normal(20)
    changes = problem.gradients(theta + step) - problem.gradients(theta)
    recycled.follow(step, list(changes))
    assert len(recycled.basis) == 5
    V = np.array(recycled.basis)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(np.array(recycled.products[-1]), problem.A @ V[-1], atol=1e-9)
    recycled.follow(step, list(changes))
    assert len(recycled.basis) == 5, "nothing of it is left outside the basis"


def test_a_plan_gains_what_it_expects_when_the_model_is_the_problem():
    problem, theta, recycled, gradients = learned(40)
    found = even(recycled.model(gradients, TARGET, [0.0, 4.0]))
    assert found.active and found.expected < 0 and found.error < 0.01 * -found.expected
    exact = receding_plan.Quadratic(problem.A, problem.gradients(theta), TARGET)
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


def test_with_little_noise_plans_are_chosen_freely_and_gain_in_truth():
    """Equal budgets, a tenth of noise on every gradient and product, ten problems: half of them acted on at least, a gain in
    all of those but one, and never a loss of more than a tenth of what the others gain on average."""
    gained = []
    for seed in range(10):
        problem, theta, recycled, gradients = learned(12, seed, n=20, noise=0.1)
        size = 0.1 * np.linalg.norm(gradients, axis=1) / np.sqrt(20)
        rest = np.full(3, 8 / 3)
        found = even(recycled.model(gradients, TARGET, [0.0, 4.0], size), rest=rest)
        if found.active:
            exact = receding_plan.Quadratic(problem.A, problem.gradients(theta), TARGET)
            base, times = np.tile(TARGET, (8, 1)), np.full(8, 0.5)
            tried = receding_plan.spread(np.vstack([found.wish, found.plan[1:]]) + 1e-9, np.ones(8), rest)
            ends = [float(receding_plan.loss_change(exact, w, times)) for w in (base, tried)]
            gained.append(ends[0] - ends[1])
    assert len(gained) >= 5
    assert sum(g > 0 for g in gained) >= len(gained) - 1
    assert min(gained) > -0.1 * np.mean(gained)


def test_segments_begin_with_the_window_and_follow_the_clock():
    times, sizes = receding_law.segments(1000, 100, [0.0, 3.0])
    assert sizes.tolist() == [100.0] * 10 and times.sum() == pytest.approx(3)
    times, sizes = receding_law.segments(950, 100, [0.0, 3.0])
    assert sizes[-1] == 50 and sizes.sum() == 950
    times, sizes = receding_law.segments(1_000_000, 100, [0.0, 2.0, 3.0])
    assert len(sizes) == receding_law.MOST_PIECES and sizes[0] == pytest.approx(100, rel=1e-6)
    assert sizes.sum() == pytest.approx(1_000_000) and times.sum() == pytest.approx(3)
    assert times[0] == pytest.approx(2.0 * 100 / 500_000, rel=1e-6), (
        "the first half of the samples takes two thirds"
    )


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
