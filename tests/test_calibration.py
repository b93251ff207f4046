"""Calibration: intervals against exact ones, comparisons that count what was measured, trust that must be earned."""

import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_commute import bracket, calibration
from megatron_commute.lockin import Effect

W = np.array([0.5, 0.3, 0.2])


@given(st.integers(1, 200), st.data())
def test_wilson_is_scipys(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(calibration.wilson(hits, n), (low, high), atol=1e-12)


def test_only_what_was_measured_beyond_doubt_is_judged_and_the_heaviest_domain_is_not():
    told, measured, se = [9.0, 2.0, -1.0], [-5.0, 1.0, -0.4], [0.1, 0.1, 0.3]
    assert calibration.compare(told, measured, se, 20, W)[:3] == (1, 0, 0)
    hits, misses, silent, logs = calibration.compare([0, -2.0, -4.0], measured, [0.01] * 3, 20, W)
    assert (hits, misses, silent) == (1, 1, 0) and logs == [pytest.approx(np.log(0.1))]
    assert calibration.compare([1.0, 0, 0], measured, [0.01] * 3, 20, W)[:3] == (0, 0, 2)


def effect(value, se=0.05):
    value = np.asarray(value)
    return Effect((value - W @ value)[None], np.full((1, 3), se), 12)


def test_a_faithful_signal_earns_trust_and_its_scale_a_coin_does_not():
    """Chance of a coin earning trust in 40 throws at Wilson 95 %: 2.5 %; fixed seed."""
    rng = np.random.default_rng(1)
    book = {}
    for _ in range(40):
        true = rng.normal(size=3)
        true -= W @ true
        told = {
            "faithful": (true / 3 * np.exp(0.1 * rng.normal(size=3))).tolist(),
            "coin": rng.normal(size=3).tolist(),
        }
        book = calibration.update(book, told, effect(true), W)
    faithful, coin = (calibration.judged(book[name]) for name in ("faithful", "coin"))
    assert faithful.trusted and faithful.rate > 0.95 and not coin.trusted and coin.low < 0.5 < coin.high
    assert abs(faithful.scale / 3 - 1) < 0.05 and faithful.dex < 0.15 and faithful.n > 40
    scale, (low, high) = calibration.for_law(faithful)
    assert low < scale < high and low > 0
    assert calibration.for_law(coin)[1][0] < 0 < calibration.for_law(coin)[1][1]


def test_before_enough_comparisons_nothing_is_said():
    book = calibration.update({}, {"x": [0, 1.0, -1.0]}, effect([0, 1, -1]), W)
    found = calibration.judged(book["x"])
    assert found.n == 2 and not found.trusted and calibration.for_law(found) == (None, None)
    assert calibration.for_law(None) == (None, None)
    empty = calibration.judged({"hits": 0, "misses": 0, "silent": 3, "logs": []})
    assert (empty.rate, empty.scale, empty.silent) == (None, None, 3)


def test_predictions_of_a_probe_have_the_constant_of_the_bracket():
    score, u_g = np.array([[0.2, -0.1, 0.3]]), np.array([[1.0, 2.0, 4.0]])
    score -= score @ W
    found = types.SimpleNamespace(score=score, u_g=u_g)
    told = calibration.foretold(found, W, W, 0.01, 8, ("adam", "local"))
    gap = told["P adam/local"][0] - told["P adam/local"][2]
    assert gap == pytest.approx(bracket.predicted_excess_loss(score[0, 0] - score[0, 2], 1.0, 0.08))
    for name in ("P adam/local", "recency adam", calibration.LAST):
        assert abs(W @ np.array(told[name])) < 1e-12
    assert told["recency adam"][2] > 0 > told["recency adam"][0]
    found.score[0, 0] = np.nan
    assert "P adam/local" not in calibration.foretold(found, W, W, 0.01, 8, ("adam", "local"))


def test_the_constant_is_right_on_trained_targets_where_the_last_domain_gains():
    """Target 1 alone: training it early costs, whoever the others are."""
    target = np.array([0.0, 1.0, 0.0])
    found = types.SimpleNamespace(score=np.zeros((1, 3)), u_g=np.zeros((1, 3)))
    told = calibration.foretold(found, target, W, 0.01, 8, ("identity", "local"))[calibration.LAST]
    assert np.sign(told).tolist() == [-1, 1, -1]
    book = calibration.update({}, {calibration.LAST: told, "x": [0, -1.0, -1.0]}, effect([-0.4, 1, -1]), W)
    assert calibration.against_constant(book) == {calibration.LAST: 0, "x": -2}
