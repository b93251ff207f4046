"""Properties of decisions: on the simplex, inside the guardrails, servable to the end, quiet inside the error bar."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from situations import situation

from megatron_commute.decide import controller
from megatron_commute.decide.controller import decide
from megatron_commute.decide.laws import LAWS as TABLE
from megatron_commute.decide.laws import significant
from megatron_commute.experiments import receding, receding_law, receding_plan
from megatron_commute.feasible import owed_shares

T3 = {0.95: 3.1824463, 0.5: 0.7648923}  # two-sided quantiles of Student's t, 3 degrees of freedom


@st.composite
def situations(draw):
    """Any situation that a run can be in: budgets that fit the samples left, bounds that the shares keep."""
    K = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left = draw(st.integers(1, 5000))
    shares = rng.dirichlet(np.full(K, draw(st.sampled_from([0.1, 1.0, 10.0]))))
    counts = np.diff(np.concatenate([[0], np.round(np.cumsum(shares) * left)]))
    endless = rng.random(K) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    part = counts / left
    score = rng.normal(size=K) * 10.0 ** draw(st.integers(-6, 6))
    error = np.abs(rng.normal(size=K)) * 10.0 ** draw(st.integers(-6, 6))
    if draw(st.booleans()):
        score[rng.integers(K)], error[rng.integers(K)] = np.nan, np.inf
    return situation(
        weights=tuple(rng.dirichlet(np.ones(K))), remaining=np.where(endless, np.nan, counts), samples_left=left,
        initial=rng.dirichlet(np.ones(K)), score=score, score_se=error, window=draw(st.integers(1, 2000)),
        minimum=part * rng.random(K) * draw(st.booleans()), maximum=part + (1 - part) * (rng.random(K) ** 0.3),
        floors=rng.random(K) * draw(st.sampled_from([0.0, 0.3, 1.0])), caps=1 - rng.random(K) * 0.5,
        rate=draw(st.sampled_from([1e-4, 0.05, 1.0])), strength=draw(st.sampled_from([0.1, 1.0, 50.0])),
        dof=draw(st.integers(1, 15)), **signals(rng, K, left),
    )  # fmt: skip


def signals(rng, K, left):
    """What the other laws look at, and the other guardrails."""
    total = left + int(rng.integers(5000))
    return {
        "target": rng.dirichlet(np.ones(K)), "losses": rng.exponential(size=K),
        "scheduled": rng.dirichlet(np.ones(K)),
        "progress": 1 - left / total, "frozen": bool(rng.random() < 0.1),
        "freeze": float(rng.choice([0.5, 1.0])),
        "decisions_since_change": int(rng.integers(3)),
    }  # fmt: skip


LAWS = sorted(TABLE)


@settings(max_examples=300, deadline=None)
@given(situations(), st.sampled_from(LAWS))
def test_a_decision_is_on_the_simplex_and_inside_its_bounds(s, law):
    decision = decide(law, s)
    assert isinstance(decision.reason, str) and decision.reason
    if decision.weights is None:
        return
    w = decision.weights
    assert np.isfinite(w).all() and (w >= 0).all() and abs(w.sum() - 1) < 1e-9
    low, high, relaxed = controller.bounds(s)
    if low.sum() <= 1 <= high.sum():
        assert (w >= low - 1e-9).all() and (w <= high + 1e-9).all()
    if not relaxed:
        asked = (low > s.weights + s.rate) | (
            high < s.weights - s.rate
        )  # only a budget or a floor may ask for more
        assert (np.abs(w - s.weights)[~asked] <= s.rate + 1e-9).all()


@settings(max_examples=300, deadline=None)
@given(situations(), st.sampled_from(LAWS))
def test_after_the_window_the_rest_of_every_budget_can_still_be_served(s, law):
    """Within minimum and maximum, and the endless domains together no more than what the budgets leave."""
    decision = decide(law, s)
    if decision.weights is None:
        return
    window = min(s.window, s.samples_left)
    later = s.samples_left - window
    budgeted = ~np.isnan(s.remaining)
    rest = s.remaining - decision.weights * window
    tolerance = 1e-6 * s.samples_left
    low, high, _ = controller.bounds(s)
    if not low.sum() <= 1 <= high.sum():
        return  # rounding at the end of a run; the mixture keeps the budgets
    assert (rest[budgeted] >= s.minimum[budgeted] * later - tolerance).all()
    assert (rest[budgeted] <= s.maximum[budgeted] * later + tolerance).all()
    assert rest[budgeted].sum() <= later + tolerance, "the endless domains have taken what the budgets need"


def test_a_wish_of_the_law_in_numbers():
    """shares exp(-strength score / max|score|), normalised: written out for two domains."""
    decision = decide("tilt", situation((0.5, 0.5), score=(2.0, -2.0), rate=1.0))
    expected = np.exp([-1.0, 1.0]) / (np.exp(1.0) + np.exp(-1.0))
    np.testing.assert_allclose(decision.weights, expected, rtol=1e-12)
    assert decision.reason == "2 of 2 scores outside their error bars"


def test_only_scores_outside_their_error_bar_count():
    """And none whose error is not finite."""
    s = situation((0.4, 0.3, 0.3), score=(1.0, 5.0, -1.0), score_se=(0.1, 4.0, 0.1), rate=1.0)
    decision = decide("tilt", s)
    expected = np.array([0.4 * np.exp(-1), 0.3, 0.3 * np.exp(1)])
    np.testing.assert_allclose(decision.weights, expected / expected.sum(), rtol=1e-12)
    assert decision.reason.startswith("2 of 3 scores")
    score, error = np.array([np.nan, np.inf, 1, 1, 1, 0]), np.array([1, 1, np.nan, np.inf, 0, 0])
    assert significant(score, error, 3, 0.95).tolist() == [False, False, False, False, True, False]


def test_inside_the_error_bar_weights_go_back_to_the_shares_within_the_rate():
    s = situation((0.6, 0.4), remaining=(400, 600), score=(1.0, -1.0), score_se=(1.0, 1.0))
    decision = decide("tilt", s)
    np.testing.assert_allclose(decision.weights, [0.55, 0.45])
    assert decision.reason.startswith("back to the remaining-budget shares")
    assert decide("hold", s).weights.tolist() == decision.weights.tolist()


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_significance_has_its_false_alarm_rate(confidence):
    """Per domain and probe: scores of mean zero pass with probability 1 - confidence (not corrected for their number)."""
    rng = np.random.default_rng(4)
    replicates = rng.normal(size=(4, 100_000))
    mean, error = replicates.mean(0), replicates.std(0, ddof=1) / 2
    assert significant(mean, error, 3, confidence).mean() == pytest.approx(1 - confidence, abs=3e-3)
    assert (
        significant(mean, error, 3, confidence) == (np.abs(mean) > T3[confidence] * error)
    ).mean() > 0.9999


def test_endless_domains_share_what_the_budgets_leave():
    shares = owed_shares(np.array([600.0, np.nan, np.nan]), 1000, np.array([0.2, 0.6, 0.2]))
    np.testing.assert_allclose(shares, [0.6, 0.3, 0.1])
    np.testing.assert_allclose(owed_shares(np.array([5.0, np.nan]), 5, np.array([0.5, 0.5])), [1.0, 0.0])
    every = owed_shares(np.array([np.nan] * 2), 7, np.array([0.0, 0.0]))
    np.testing.assert_allclose(every, [0.5, 0.5])


def test_two_budgets_are_not_starved_by_an_endless_domain():
    """100 of the last 110 samples belong to two budgets: of 50 the endless one may have 10, whatever its score."""
    s = situation(
        (0.3, 0.3, 0.4), remaining=(50, 50, np.nan), samples_left=110, window=50, score=(1.0, 1.0, -1.0), rate=1.0,
        strength=20.0,
    )  # fmt: skip
    np.testing.assert_allclose(decide("tilt", s).weights, [0.4, 0.4, 0.2])


def test_floors_caps_and_rate_limit_the_wish_and_the_reason_says_so():
    s = situation((0.5, 0.5), score=(2.0, -2.0), floors=(0.45, 0.0))
    decision = decide("tilt", s)
    np.testing.assert_allclose(decision.weights, [0.45, 0.55])
    assert decision.reason.endswith("the wish is limited by rate, floors, caps or budgets")
    np.testing.assert_allclose(decide("tilt", situation((0.5, 0.5), score=(2.0, -2.0), caps=(1.0, 0.52))).weights,
                               [0.48, 0.52])  # fmt: skip
    for limit, weights in (({"rate": 0.01}, [0.49, 0.51]), ({"minimum": (0.48, 0.0)}, [0.48, 0.52])):
        s = situation((0.5, 0.5), score=(2.0, -2.0), **{"rate": 1.0, **limit})
        np.testing.assert_allclose(decide("tilt", s).weights, weights)


def test_budgets_win_over_boxes_that_contradict_them():
    """900 of the last 1000 samples belong to one domain; floors, caps and rate ask for something else."""
    s = situation(
        (0.5, 0.5), remaining=(900, 100), window=1000, score=(1.0, -1.0), caps=(0.6, 1.0), rate=0.05
    )
    decision = decide("tilt", s)
    np.testing.assert_allclose(decision.weights, [0.9, 0.1])
    assert "budgets win" in decision.reason
    lows = situation((0.5, 0.5), floors=(0.8, 0.8), score=(1.0, -1.0))  # no weights have both
    assert decide("tilt", lows).weights is None


def test_when_budgets_ask_for_more_than_the_rate_the_law_gets_no_more_than_the_rate():
    """The first domain must rise from 0.5 to 0.56; the tilt, which wants 0.9, must not ride along."""
    s = situation(
        (0.5, 0.5),
        remaining=(780, 220),
        samples_left=1000,
        window=500,
        score=(-1.0, 1.0),
        maximum=(1.0, 1.0),
        strength=2.0,
    )
    np.testing.assert_allclose(decide("tilt", s).weights, [0.56, 0.44])
    assert "budgets win" in decide("tilt", s).reason


def test_at_the_end_of_the_run_nothing_is_decided():
    decision = decide("tilt", situation(samples_left=0, remaining=(0, 0, 0)))
    assert decision.weights is None and "run ends" in decision.reason
    assert decide("tilt", situation((1.0,), score=(0.0,))).weights is None


@settings(max_examples=100, deadline=None)
@given(situations(), st.sampled_from(LAWS))
def test_a_replayed_situation_gives_the_same_decision_and_is_not_touched(s, law):
    """Also after its memory has been through JSON, and after other laws have looked at it."""
    before = copy.deepcopy(s)
    first = decide(law, s)
    decide("odm", s)
    memory = json.loads(json.dumps(s.memory))
    again = decide(law, dataclasses.replace(s, memory=memory))
    assert first.reason == again.reason
    assert json.dumps(first.memory) == json.dumps(again.memory)
    assert (
        np.array_equal(first.weights, again.weights) if first.weights is not None else again.weights is None
    )
    for field in dataclasses.fields(s):
        np.testing.assert_equal(getattr(s, field.name), getattr(before, field.name))


@settings(max_examples=100, deadline=None)
@given(situations(), st.just("tilt"))
def test_no_law_acts_inside_its_error(s, law):
    """Scores of no more than their error: the decision is that of `hold`."""
    silent = {"frozen": False, "freeze": 1.0, "cooldown": 0}
    s = dataclasses.replace(s, score_se=np.abs(s.score), **silent)
    decision, held = decide(law, s), decide("hold", s)
    assert (decision.weights is None) == (held.weights is None)
    if held.weights is not None:
        np.testing.assert_allclose(decision.weights, held.weights)


def model_of(K, seed, noise):
    """Any small quadratic model of K domains; with much noise its leaner twin disagrees about gradients."""
    rng = np.random.default_rng(seed)
    H = rng.normal(size=(K, 4, 4))
    full = receding_plan.Quadratic(
        H=H @ H.swapaxes(1, 2), g=rng.normal(size=(K, 4)), target=np.full(K, 1 / K)
    )
    lean = full if noise < 1 else dataclasses.replace(full, g=-full.g)
    errors = np.full((K, 4, 4), noise), np.full((K, 4), noise)
    return receding.Model(full=full, lean=lean, H_se=errors[0], g_se=errors[1], clock=np.array([0.0, 1.0]))


@settings(max_examples=6, deadline=None)
@given(situations(), st.integers(0, 2**32), st.sampled_from([0.0, 0.1]))
def test_a_law_given_as_a_function_has_the_properties_of_every_law(s, seed, noise):
    model = model_of(len(s.weights), seed, noise)
    before = copy.deepcopy(model)
    for test in (
        test_a_decision_is_on_the_simplex_and_inside_its_bounds,
        test_after_the_window_the_rest_of_every_budget_can_still_be_served,
        test_a_replayed_situation_gives_the_same_decision_and_is_not_touched,
    ):
        test.hypothesis.inner_test(s, functools.partial(receding_law.receding, model=model, loss=1.0))
    for name in ("H", "g", "target"):
        assert np.array_equal(getattr(model.full, name), getattr(before.full, name))
    noisy = functools.partial(receding_law.receding, model=model_of(len(s.weights), seed, 10.0), loss=1.0)
    test_no_law_acts_inside_its_error.hypothesis.inner_test(s, noisy)


def test_a_law_given_as_a_function_does_not_rest():
    """It is not in the table that says which laws do; the guardrails hold for it as for the others."""
    wish = controller.Wish(np.array([0.9, 0.1]), True, "all of the first")
    given = {"score": (0, 0), "decisions_since_change": 0, "cooldown": 3}
    decision = decide(lambda seen: wish, situation((0.5, 0.5), **given))
    assert decision.weights == pytest.approx([0.55, 0.45]) and decision.reason.startswith("all of the first")
