"""Law flow: closed forms of its profile, weights by hand, budgets and bounds, and the same weights from any later step."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_commute.decide import flow
from megatron_commute.mixture import Mixture
from megatron_commute.settings.rates import STYLES, WSD_STYLES, RateSchedule, rates

SHARES = np.array([0.6, 0.1, 0.3])


def run(steps=200, batch=10, shares=SHARES, **other):
    """Arguments of flow.planned: a constant rate, the second domain as the target."""
    samples = steps * batch
    return {
        "rates": np.full(steps, 1e-3),
        "batches": np.full(steps, batch),
        "budgets": [round(share * samples) for share in shares],
        "weights": shares,
        "target": np.eye(len(shares))[1],
        "low": np.zeros(len(shares)),
        "high": np.ones(len(shares)),
        **other,
    }


def sizes_of(found, batches):
    return np.add.reduceat(np.asarray(batches), found.edges[:-1])


@st.composite
def runs(draw):
    """A run with any style, warm-up, batch ramp-up, budgets, endless domains, target and bounds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps, K = draw(st.integers(12, 400)), draw(st.integers(2, 7))
    style = {"lr_decay_style": draw(st.sampled_from(STYLES)), "lr_wsd_decay_iters": max(1, steps // 5)}
    style["lr_wsd_decay_style"] = draw(st.sampled_from(WSD_STYLES))
    style["lr_warmup_iters"] = draw(st.integers(0, steps // 4))
    style["min_lr"] = draw(st.sampled_from([0.0, 1e-4]))
    schedule = RateSchedule(lr=1e-3, train_iters=steps, **style)
    batches = np.full(steps, draw(st.integers(1, 64)))
    if draw(st.booleans()):
        batches[: steps // 3] = np.maximum(1, batches[: steps // 3] // 2)
    samples = int(batches.sum())
    shares = rng.dirichlet(np.full(K, 2.0))
    budgets = [int(share * samples) for share in shares]
    budgets[0] += samples - sum(budgets)
    for k in range(K):
        if draw(st.integers(0, 3)) == 0:
            budgets[k] = None
    weights = rng.dirichlet(np.ones(K))
    planned = np.array([0 if b is None else b for b in budgets]) / samples
    endless = np.array([b is None for b in budgets])
    planned[endless] = (1 - planned.sum()) * weights[endless] / weights[endless].sum()
    low, high = planned * rng.uniform(0, 1, K), planned + (1 - planned) * rng.uniform(0, 1, K)
    asked = np.where(planned > 0, rng.dirichlet(np.ones(K)), 0.0)
    return {
        "rates": rates(schedule),
        "batches": batches,
        "budgets": budgets,
        "weights": weights,
        "target": asked / asked.sum(),
        "low": low,
        "high": high,
        "strength": draw(st.sampled_from([0.25, 1.0, 2.0])),
    }, planned


def test_profile_of_a_constant_rate_is_a_known_exponential():
    """p = exp(-c (1 - u)) at u = (n + 1) / T, scaled between its ends."""
    steps, memory = 500, 2.5
    u = (np.arange(steps) + 1) / steps
    expected = np.exp(-memory * (1 - u))
    expected = (expected - expected[50]) / (expected[-1] - expected[50])
    given = np.full(steps, 3e-4)
    scale = flow.scale_of(given, memory, 50)
    assert flow.profile(given, memory, scale) == pytest.approx(expected, abs=1e-12)
    assert scale.peak == 3e-4 and scale.total == pytest.approx(0.15) and scale.high == pytest.approx(1.0)


def test_profile_of_a_cosine_peaks_where_calculus_says():
    """d/du [ln a - c left] = 0 for a = (1 + cos pi u) / 2, left = 1 - u - sin(pi u) / pi: at a' / a = -2 c a."""
    steps, memory = 20_000, 2.5
    u = np.arange(steps) / steps
    given = 0.5 * (1 + np.cos(np.pi * u))
    p = flow.profile(given, memory, flow.scale_of(given, memory, 0))
    found = u[p.argmax()]
    a = 0.5 * (1 + math.cos(math.pi * found))
    slope = -0.5 * math.pi * math.sin(math.pi * found)
    assert slope / a == pytest.approx(-2 * memory * a, rel=1e-3)
    assert p.min() == 0 and p.max() == 1 and 0.3 < found < 0.5


def test_profile_under_WSD_turns_where_the_decay_begins():
    given = rates(RateSchedule(lr=1e-3, train_iters=1000, lr_decay_style="WSD", lr_wsd_decay_iters=200,
                               lr_wsd_decay_style="linear"))  # fmt: skip
    p = flow.profile(given, 2.5, flow.scale_of(given, 2.5, 100))
    assert abs(int(p.argmax()) - 800) <= 1 and p[-1] < 0.05


def test_profile_of_three_steps_by_hand():
    """Rates 1, 2, 1 and c = 4 ln 2: flow 3, 1, 0 of 4 follows, so p = 1/2 / 8, 1 / 2, 1/2."""
    given, memory = np.array([1.0, 2.0, 1.0]), 4 * math.log(2)
    scale = flow.scale_of(given, memory, 0)
    assert flow.influence(given, memory, scale.peak, scale.total) == pytest.approx([1 / 16, 1 / 2, 1 / 2])
    assert (scale.peak, scale.total) == (2, 4) and (scale.low, scale.high) == pytest.approx((1 / 16, 1 / 2))
    assert flow.profile(given, memory, scale) == pytest.approx([0, 1, 1])


def test_two_steps_by_hand():
    """p is 0 and then 1, so the log odds of the target's domain differ by its range over the other's."""
    found = flow.planned(**run(steps=2, batch=100, shares=np.array([0.5, 0.5]), kept=0, target=[0, 1]))
    reach = 3.5 * (2 / 10)
    assert np.diff(found.ranges) == pytest.approx(reach)
    w = found.weights[:, 1]
    assert w.sum() == pytest.approx(1.0, abs=1e-14)  # its budget
    odds = w / (1 - w)
    assert math.log(odds[1] / odds[0]) == pytest.approx(reach, abs=1e-12)
    assert [at for at, _ in found.changes] == [0, 100]


def test_log_odds_follow_the_profile_and_the_first_steps_are_kept():
    found = flow.planned(**run(steps=500))
    assert found.edges[:2].tolist() == [0, 50] and len(found.weights) <= 100
    assert found.weights[0] == pytest.approx(SHARES, abs=1e-15)
    p = np.add.reduceat(found.profile, found.edges[:-1]) / np.diff(found.edges)
    odds = np.log(found.weights[1:, 1] / found.weights[1:, 0])
    assert odds - odds[0] == pytest.approx(3.5 * (p[1:] - p[1]), abs=1e-9)
    assert found.weights[1:, 2] / found.weights[1:, 0] == pytest.approx(0.5, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_budgets_and_bounds_hold_and_any_later_step_makes_the_same_weights(case):
    given, planned = case
    found = flow.planned(**given)
    sizes = sizes_of(found, given["batches"])
    samples = sizes.sum()
    assert abs(found.weights.sum(1) - 1).max() < 1e-13
    assert abs(sizes @ found.weights - planned * samples).max() <= 1e-13 * samples
    assert (found.weights >= given["low"] - 1e-9).all() and (found.weights <= given["high"] + 1e-9).all()
    begun = np.cumsum(given["batches"]) - given["batches"]
    assert {at for at, _ in found.changes} <= set(begun.tolist()) and len(found.changes) <= 100

    every = np.repeat(found.weights, np.diff(found.edges), axis=0)
    scale = flow.Scale(**json.loads(json.dumps(dataclasses.asdict(found.scale))))
    for begin in (1, len(begun) // 3, len(begun) - 1):
        used = given["batches"][:begin] @ every[:begin]
        again = flow.planned(**given, scale=scale, begin=begin, used=used)
        assert again.changes[0][0] == begun[begin]
        left = np.repeat(again.weights, np.diff(again.edges), axis=0)
        owed = samples - begun[begin]
        assert left == pytest.approx(every[begin:], abs=max(1e-9, 1e-13 * samples / owed))


@settings(max_examples=30, deadline=None)
@given(runs(), st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_neither_the_unit_of_rates_nor_the_order_of_domains_matters(case, unit, chance):
    given, _ = case
    found = flow.planned(**given)
    scaled = flow.planned(**{**given, "rates": unit * given["rates"]})
    assert scaled.weights == pytest.approx(found.weights, abs=1e-9)
    order = list(range(len(given["budgets"])))
    chance.shuffle(order)
    per_domain = ("weights", "target", "low", "high")
    moved = {name: np.asarray(given[name])[order] for name in per_domain}
    moved["budgets"] = [given["budgets"][k] for k in order]
    assert flow.planned(**{**given, **moved}).weights == pytest.approx(found.weights[:, order], abs=1e-9)


def test_the_stream_of_samples_keeps_the_budgets_to_the_last_one():
    given = run(steps=300, batch=8)
    found = flow.planned(**given)
    mixture = Mixture(SHARES, given["budgets"])
    for at, weights in found.changes:
        mixture.schedule(weights, at)
    mixture.take(2400)
    assert mixture.served.tolist() == given["budgets"] and not mixture.projections


@pytest.mark.parametrize(
    ("other", "note"),
    [
        ({"target": SHARES}, flow.SAME_TARGET),
        ({"target": 7 * SHARES}, flow.SAME_TARGET),
        ({"memory": 0.0}, flow.SAME_STEPS),
        ({"rates": np.where(np.arange(200) < 10, 1e-3, 0.0)}, flow.SAME_STEPS),
        ({"low": SHARES, "high": SHARES}, flow.NO_ROOM),
    ],
)
def test_where_nothing_can_be_gained_the_planned_mixture_stays_and_says_why(other, note):
    found = flow.planned(**run(**other))
    assert found.notes == (note,)
    ((at, weights),) = found.changes
    assert at == 0 and weights.tolist() == SHARES.tolist()


def test_endless_domains_count_with_weight_times_samples():
    whole, open_ended = flow.planned(**run()), flow.planned(**run(budgets=[None, 200, None]))
    assert open_ended.weights == pytest.approx(whole.weights, abs=1e-12)
    found = flow.planned(**run(budgets=[None, None, None], weights=2 * SHARES))
    assert found.weights == pytest.approx(whole.weights, abs=1e-12)


def test_bounds_cut_the_schedule_and_budgets_still_hold():
    found = flow.planned(**run(high=np.array([1, 0.15, 1]), low=np.array([0, 0.05, 0])))
    w = found.weights[:, 1]
    assert w.max() == pytest.approx(0.15, abs=1e-12) and w.min() == pytest.approx(0.05, abs=1e-12)
    assert sizes_of(found, np.full(200, 10)) @ w == pytest.approx(200, abs=1e-10)


def test_a_changed_run_is_planned_from_what_it_has_served():
    given = run()
    found = flow.planned(**{**given, "budgets": [1100, 300, 600]}, scale=flow.scale_of(given["rates"], 2.5, 20), begin=50,
                         used=[310, 40, 150])  # fmt: skip
    assert found.edges[0] == 50 and found.changes[0][0] == 500
    assert sizes_of(found, given["batches"]) @ found.weights == pytest.approx([790, 260, 450], abs=1e-9)


def test_a_bound_that_whole_samples_miss_by_less_than_one_does_not_end_a_changed_run():
    given = run(low=np.array([0, 0, 0.3]), high=np.array([1, 1, 0.3]), begin=30)
    found = flow.planned(**given, used=[179, 30, 91])  # 90 would have been the share of the third
    assert found.weights[:, 2] == pytest.approx(509 / 1700, abs=1e-12) and np.ptp(found.weights[:, 1]) > 0.05
    with pytest.raises(
        ValueError, match="domain 2: 480 of the 1700 samples left is outside the weight bounds"
    ):
        flow.planned(**given, used=[150, 30, 120])


def test_ranges_follow_the_target_over_the_share_up_to_their_limit():
    assert flow.ranges([0, 1, 0], SHARES) == pytest.approx([-0.35, 3.15, -0.35])
    assert flow.ranges([0, 1, 0], [0.6, 0.01, 0.39]) == pytest.approx([-0.35, 3.15, -0.35])  # not above RANGE
    assert flow.ranges([1, 1, 1], SHARES, 2.0) == pytest.approx(0.7 * (1 / 3 / SHARES - 1))
    assert not flow.ranges([0.6, 0.1, 0.3], SHARES).any()
    assert [flow.kept_steps(steps) for steps in (5, 500, 2000, 8000)] == [0, 50, 100, 100]


def test_the_strength_is_in_proportion_to_the_harm_allowed_and_at_most_one():
    assert [flow.strength_within(harm) for harm in (0.00125, 0.0025, 0.005, 0.02)] == [0.25, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="harm 0: write a part of the loss above 0"):
        flow.strength_within(0)


def test_other_learning_rates_than_the_planned_ones_are_told():
    given = rates(RateSchedule(lr=1e-3, train_iters=100))
    scale = flow.scale_of(given, 2.5, 10)
    assert len(json.dumps(dataclasses.asdict(scale))) < 200
    flow.check_scale(scale, given.copy(), 2.5, 10)
    with pytest.raises(
        ValueError, match=r"planned under other learning rates \(peak 0.001, now 0.002\): restore"
    ):
        flow.check_scale(scale, 2 * given, 2.5, 10)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rates": np.zeros(200)}, "all learning rates are 0, so no step counts: set --lr, or choose law hold"),
        ({"rates": np.full(200, np.nan)}, "needs the learning rate of every step: give finite numbers >= 0"),
        ({"rates": np.ones(150)}, "batches: give the samples of every step"),
        ({"batches": np.zeros(200)}, "batches: give the samples of every step, each at least 1"),
        ({"kept": 200}, "kept steps 200 in a run of 200: keep fewer"),
        ({"memory": -1.0}, "memory -1.0: write a finite number >= 0"),
        ({"strength": 11.0}, "strength 11.0: write a number above 0, at most 10"),
        ({"target": [0, -1, 2]}, "give finite numbers >= 0"),
        ({"target": [0, 0, 0]}, "at least one of them above 0"),
        ({"budgets": [1400, 0, 600]}, "domain 1 has a target but no samples: give it a budget or take it out"),
        ({"budgets": [1400, 200, 600]}, "budgets of 2200 samples in a run of 2000: change them"),
        ({"budgets": [None, 200, 600], "weights": [0, 0.5, 0.5]}, "no domain without a budget has a weight above 0"),
        ({"low": np.array([0.7, 0, 0])}, "outside the weight bounds [0.7, 1] to the end: change the budget or"),
        ({"begin": 200}, "nothing is left to plan"),
        ({"begin": 20}, "0 samples used before step 20, which begins at 200"),
        ({"begin": 30, "used": [50, 250, 0]}, "domain 1 has used 250 of a budget of 200: raise it"),
    ],
)  # fmt: skip
def test_what_makes_no_schedule_is_refused_with_its_cure(other, told):
    with pytest.raises(ValueError) as error:
        flow.planned(**run(**other))
    assert told in str(error.value) and "\n" not in str(error.value)
