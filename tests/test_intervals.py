"""Confidence intervals against those of scipy.stats."""

import pytest
from scipy import stats

from megatron_commute import intervals


@pytest.mark.parametrize("dof", [1, 3, 30])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_student_is_scipys(dof, confidence):
    expected = stats.t.interval(confidence, dof)[1]
    assert intervals.student(dof, confidence) == pytest.approx(expected, rel=1e-9)
