"""The KL projection against the conditions that define it, and the refusals of contradicting limits."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_commute.feasible import nearest, normalised


@st.composite
def boxes(draw):
    """(wish, low, high, mass) with low <= some point of that mass <= high."""
    K = draw(st.integers(1, 8))
    numbers = st.lists(st.floats(0, 1), min_size=K, max_size=K).map(np.array)
    inside = draw(numbers.filter(lambda x: x.sum() > 1e-3))
    low, high = inside * draw(numbers), inside + draw(numbers)
    wish = draw(numbers.filter(lambda x: x.sum() > 1e-3))
    return wish / wish.sum(), low, high, float(inside.sum())


@settings(max_examples=150, deadline=None)
@given(boxes())
def test_projection_meets_its_optimality_conditions(box):
    wish, low, high, mass = box
    w = nearest(wish, low, high, mass)
    assert math.isclose(math.fsum(w), mass, rel_tol=1e-9)
    assert (w >= low - 1e-12).all() and (w <= high + 1e-12).all()
    wished = wish > 1e-200
    ratio = w[wished] / wish[wished]
    at_low, at_high = w[wished] <= low[wished] + 1e-12, w[wished] >= high[wished] - 1e-12
    # one multiplier for all: raised to low above it, cut to high below it, equal in between
    least = ratio[~at_low].max(initial=0.0)
    most = ratio[~at_high].min(initial=math.inf)
    assert least <= most * (1 + 1e-6) + 1e-9
    if (w[~wished] > low[~wished] + 1e-9).any():
        assert at_high.all()


def test_feasible_wishes_come_back_bit_for_bit():
    wish = normalised(np.array([0.1, 0.2, 0.7]))
    assert nearest(wish, np.zeros(3), np.ones(3)).tobytes() == wish.tobytes()
    assert normalised([3, 1]).tolist() == [0.75, 0.25]
    almost = np.full(3, 1 / 3)
    assert normalised(almost).tobytes() == almost.tobytes()


def test_zero_wishes_wait_until_the_others_are_full():
    low, high = np.zeros(4), np.array([0.3, 0.2, 1.0, 1.0])
    assert nearest(
        np.array([0.5, 0.5, 0.0, 0.0]), low, high, spread=np.array([0, 0, 3.0, 1.0])
    ) == pytest.approx([0.3, 0.2, 0.375, 0.125])
    assert nearest(np.array([0.5, 0.5, 0.0, 0.0]), low, np.ones(4)).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_wishes_of_any_size_keep_the_mass():
    wish, high = np.array([1.0, 7e-161, 0.0]), np.array([0.5, 1.0, 0.0])
    assert nearest(wish, np.zeros(3), high, 0.5) == pytest.approx([0.5, 0.0, 0.0])


def test_an_empty_box_gives_its_nearer_corner_at_the_right_mass():
    wish = np.array([0.5, 0.5])
    assert nearest(wish, np.zeros(2), np.array([0.2, 0.6])) == pytest.approx([0.25, 0.75])
    assert nearest(wish, np.array([0.9, 0.6]), np.ones(2)) == pytest.approx([0.6, 0.4])
    assert nearest(wish, np.zeros(2), np.array([2e-310, 0.0])).tolist() == [1.0, 0.0]
