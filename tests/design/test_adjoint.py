"""Influences against finite differences of the weights, through the whole run, in float64."""

import numpy as np
import pytest
import torch
from proxies import STEPS, run_of

from megatron_commute.design import adjoint

SEGMENTS = 20
CASES = [("gpt2", "constant", 1e9), ("gpt2", "linear", 0.3), ("gpt2", "cosine", 1e9), ("gpt2", "WSD", 0.3)]
CASES += [("gpt2", "inverse-square-root", 0.3), ("llama", "cosine", 0.3), ("llama", "WSD", 1e9)]


def recorded(run, **how):
    held = {str(k): run.stream.held(k) for k in range(2)}
    weights = np.tile(run.proxy.shares, (STEPS, 1))
    return adjoint.influences(run, weights, held, **how), held, weights


def final(run, weights, held):
    state = run.advance(run.start(), weights, 0, STEPS)
    return np.array([run.model.mean_loss(state.theta, tokens) for tokens in held.values()])


@pytest.mark.parametrize(("flavour", "style", "clip"), CASES)
def test_influences_are_those_of_finite_differences(flavour, style, clip):
    run = run_of(flavour, style, clip)
    found, held, weights = recorded(run, limit=float("inf"))
    length, h = STEPS // SEGMENTS, 1e-4
    own = found.values.reshape(2, SEGMENTS, length, 3).sum(2)
    for segment, k in ((2, 0), (8, 1), (15, 2), (19, 1)):
        sides = []
        for sign in (1, -1):
            moved = weights.copy()
            moved[segment * length : (segment + 1) * length, k] += sign * h
            sides.append(final(run, moved, held))
        error = np.abs((sides[0] - sides[1]) / (2 * h) - own[:, segment, k]).max()
        assert error <= 1e-5 * np.abs(own[:, 2:]).max()  # float64 gives 1e-8


def test_a_case_with_clipping_clips():
    run = run_of("gpt2", "WSD", 0.3)
    tokens, scale = run.weighted_batch(0, run.proxy.shares)
    gradient, _ = run.model.gradient(run.start().theta, tokens, scale)
    assert run.clipping(gradient)[0] < 0.5


def test_recomputed_states_give_the_same_numbers():
    run = run_of(dtype=torch.float32)
    whole, _, _ = recorded(run)
    again, _, _ = recorded(run, recompute=True)
    assert whole.reached == again.reached
    np.testing.assert_array_equal(whole.values, again.values)


@pytest.mark.parametrize("flavour", ["gpt2", "llama"])
def test_double_backward_agrees_with_differences(flavour):
    run = run_of(flavour, clip=0.3)
    by_difference, _, _ = recorded(run)
    exact, _, _ = recorded(run, method="exact")
    largest = np.abs(exact.values).max()
    assert np.abs(by_difference.values - exact.values).max() <= 1e-6 * largest


def test_single_precision_is_within_a_few_percent():
    fine, _, _ = recorded(run_of())
    coarse, _, _ = recorded(run_of(dtype=torch.float32))
    assert np.abs(fine.values - coarse.values).max() <= 0.05 * np.abs(fine.values).max()


def test_influences_are_linear_in_the_loss():
    run = run_of()
    found, held, weights = recorded(run, limit=float("inf"))
    both = {"both": torch.cat(list(held.values()))}
    joined = adjoint.influences(run, weights, both, limit=float("inf"))
    first = STEPS // 5  # before it influences are kept within what the rest shows, which is not linear
    mean = found.values.mean(0)[first:]
    assert np.abs(joined.values[0, first:] - mean).max() <= 1e-6 * np.abs(mean).max()


def test_the_sweep_ends_where_the_cotangent_grows():
    run = run_of()
    found, _, _ = recorded(run, limit=0.5)  # below one, so that the first step back ends it
    assert found.reached == STEPS - 1
    early, _, _ = recorded(run)
    assert early.reached >= STEPS // 10
    assert (early.values[:, : early.reached] == early.values[:, :1]).all()


def test_vectors_held_are_those_that_lie_there():
    run = run_of(dtype=torch.float32)
    size, most = run.model.size, []
    back = adjoint._back

    def counted(*arguments):
        import gc

        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.untyped_storage().nbytes() >= 4 * size
        }
        most.append(sum(alive.values()) / (4 * size))
        return back(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adjoint, "_back", counted)
        for recompute in (False, True):
            most.clear()
            recorded(run, recompute=recompute)
            stated = adjoint.vectors_held(STEPS, 2, recompute)
            own = sum(len(t) for t in run.stream.tokens) * 9 * 8 / (4 * size)  # the made-up text itself
            assert abs(max(most) - own - stated) <= max(0.1 * stated, 12), (max(most) - own, stated)
