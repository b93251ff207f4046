"""Confidence intervals against those of scipy.stats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_commute import intervals


@given(st.integers(1, 200), st.data())
def test_wilson_is_scipys(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(intervals.wilson(hits, n), (low, high), atol=1e-12)


@pytest.mark.parametrize("dof", [1, 3, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_is_scipys(dof, confidence):
    expected = stats.t.interval(confidence, dof)[1]
    assert intervals.student(dof, confidence) == pytest.approx(expected, rel=1e-9)
