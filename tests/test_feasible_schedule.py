"""The KL projection of a whole schedule: its optimality conditions, examples by hand, and refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_commute.feasible import nearest, nearest_schedule


@st.composite
def schedules(draw, segments=30, domains=8, steepest=12.0):
    """(wish, sizes, budgets, low, high); bounds may be as tight as a hundredth of the share."""
    M, K = draw(st.integers(1, segments)), draw(st.integers(1, domains))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = rng.dirichlet(np.full(K, draw(st.sampled_from([0.3, 1.0, 5.0]))))
    if K > 2 and draw(st.booleans()):
        share[0] = 0.0
        share /= share.sum()
    sizes = rng.integers(1, 20_000, M).astype(float)
    low = share * rng.uniform(0, 1, K) ** draw(st.sampled_from([0.01, 1.0, 5.0]))
    high = share + (1 - share) * rng.uniform(0, 1, K) ** draw(st.sampled_from([1.0, 8.0]))
    wish = np.exp(rng.uniform(0, draw(st.floats(0, steepest)), (M, K)))
    return wish, sizes, share * sizes.sum(), low, high


def holds(w, sizes, budgets, low, high):
    """Rows, budgets and bounds to rounding."""
    assert abs(w.sum(1) - 1).max() < 1e-13
    assert abs(sizes @ w - budgets).max() <= 1e-14 * sizes.sum()
    assert (w >= low - 1e-12).all() and (w <= high + 1e-12).all()


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_schedule_meets_its_optimality_conditions(case):
    """No two domains can trade samples between two segments and come nearer: by the KL divergence's own derivatives."""
    wish, sizes, budgets, low, high = case
    w = nearest_schedule(*case)
    holds(w, sizes, budgets, low, high)
    cost = np.log(np.maximum(w, 1e-300) / wish)  # marginal, for one sample of domain k in segment m
    up, down = w < high - 1e-9, w > low + 1e-9
    grows = np.where(up, cost, np.inf)[:, None, :, None] - np.where(down, cost, -np.inf)[:, None, None, :]
    swap = grows + np.swapaxes(grows, 2, 3).swapaxes(0, 1)  # k up and l down in m, the other way in n
    assert swap.min() >= -1e-6


def test_two_segments_by_hand():
    """Odds ratio of the wish kept: w1(1-w2) / ((1-w1) w2) = 9 with w1 + w2 = 1 gives w1 = 3/4."""
    w = nearest_schedule([[9.0, 1.0], [1.0, 1.0]], [100, 100], [100, 100], np.zeros(2), np.ones(2))
    assert w == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.75]]), abs=1e-14)
    w = nearest_schedule([[9.0, 1.0], [1.0, 1.0]], [100, 100], [100, 100], np.zeros(2), np.array([0.6, 1.0]))
    assert w == pytest.approx(np.array([[0.6, 0.4], [0.4, 0.6]]), abs=1e-14)


def test_one_segment_serves_its_budgets_and_a_pinned_domain_its_share():
    wish, low, high = np.array([[0.7, 0.2, 0.1]]), np.array([0.0, 0.3, 0.0]), np.array([0.5, 1.0, 1.0])
    share = nearest(wish[0], low, high)
    assert nearest_schedule(wish, [10], 10 * share, low, high)[0] == pytest.approx(share, abs=1e-15)
    low, high = np.array([0.0, 0.3, 0.0]), np.array([0.5, 0.3, 0.9])
    w = nearest_schedule(np.exp(np.eye(3)), [1.0, 1, 2], [1.6, 1.2, 1.2], low, high)
    assert (w[:, 1] == 0.3).all()
    holds(w, np.array([1.0, 1, 2]), np.array([1.6, 1.2, 1.2]), low, high)


@pytest.mark.parametrize(
    ("budgets", "low", "high", "told"),
    [
        ([100, 100], [0.6, 0], [1, 1], "outside the weight bounds [0.6, 1] to the end: change the budget or the bounds"),
        ([100, 100], [0, 0], [1, 0.4], "domain 1: 100 of the 200 samples left"),
        ([100, 90], [0, 0], [1, 1], "budgets of 190 samples in 200: give equal sums"),
    ],
)  # fmt: skip
def test_no_schedule_is_refused_with_its_cure(budgets, low, high, told):
    with pytest.raises(ValueError) as error:
        nearest_schedule(np.ones((2, 2)), [100, 100], budgets, np.array(low), np.array(high))
    assert told in str(error.value)
    with pytest.raises(ValueError, match="finite numbers above 0"):
        nearest_schedule(np.zeros((2, 2)), [100, 100], [100, 100], np.zeros(2), np.ones(2))
