"""Laws by their own formulas, worked out by hand or run against what they promise; properties of all in test_controller."""

import json

import numpy as np
import pytest
from test_controller import situation

from megatron_commute import laws
from megatron_commute.controller import decide
from megatron_commute.laws import LAWS, NEEDS


def test_every_law_says_what_it_needs_and_holds_without_it():
    assert set(LAWS) == set(NEEDS) == {
        "hold", "schedule", "proportional", "tau-tail", "tilt", "response", "finish", "odm",
    }  # fmt: skip
    s = situation((0.5, 0.3, 0.2), score=(np.nan,) * 3, score_se=(np.nan,) * 3)
    for name, law in LAWS.items():
        wish = law(s)
        np.testing.assert_allclose(wish.weights, [0.5, 0.3, 0.2], err_msg=name)
        assert not wish.active and wish.expected is None, name
    assert set(LAWS) >= laws.MEASURED


def test_schedule_follows_the_file():
    assert LAWS["schedule"](situation(scheduled=(0.1, 0.2, 0.7))).weights.tolist() == [0.1, 0.2, 0.7]


def test_proportional_forgets_the_plan_of_endless_domains():
    s = situation((0.2, 0.6, 0.2), remaining=(400, np.nan, np.nan), score=(0, 0, 0))
    np.testing.assert_allclose(LAWS["proportional"](s).weights, [0.4, 0.3, 0.3])
    np.testing.assert_allclose(LAWS["hold"](s).weights, [0.4, 0.45, 0.15])


def test_tau_tail_spends_the_excess_first_and_ends_on_the_target():
    """600, 300, 100 of 1000 left, target thirds: the tail of 300 takes 100 each, so 500, 200, 0 come in the first 700."""
    s = situation(remaining=(600, 300, 100), target=(1 / 3, 1 / 3, 1 / 3), window=100)
    np.testing.assert_allclose(LAWS["tau-tail"](s).weights, [5 / 7, 2 / 7, 0], atol=1e-12)
    s = situation(remaining=(200, 150, 100), samples_left=450, target=(1 / 3, 1 / 3, 1 / 3), window=300)
    half = [(100 + 50) / 300, (50 + 50) / 300, 50 / 300]
    np.testing.assert_allclose(LAWS["tau-tail"](s).weights, half, atol=1e-12)
    at_end = situation(remaining=(100, 100, 100), samples_left=300, target=(1 / 3, 1 / 3, 1 / 3))
    assert not LAWS["tau-tail"](at_end).active
    only = situation(remaining=(600, 300, 100), target=(0.0, 0.0, 1.0))
    np.testing.assert_allclose(LAWS["tau-tail"](only).weights, [2 / 3, 1 / 3, 0], atol=1e-12)


def test_response_steps_along_effects_outside_their_error_and_says_what_it_expects():
    s = situation(
        (0.5, 0.3, 0.2),
        effect=(0.04, -0.06, 0.2),
        effect_se=(0.001, 0.001, 1.0),
        effect_dof=30,
        loss=3.0,
        window=1000,
    )
    wish = LAWS["response"](s)
    effect = np.array([0.04, -0.06, 0.0])
    effect[:2] -= np.array([0.5, 0.3]) @ effect[:2]
    expected = np.array([0.5, 0.3, 0.2]) * (1 - 0.2 * effect / np.abs(effect).max())
    np.testing.assert_allclose(wish.weights, expected / expected.sum(), atol=1e-12)
    moved = wish.weights - s.weights
    assert wish.expected == pytest.approx(moved[0] * 0.04 - moved[1] * 0.06) and wish.expected < 0
    assert wish.expected_se == pytest.approx(0.001 * np.hypot(moved[0], moved[1]))
    assert np.abs(moved / s.weights).max() < 0.25, "no further than effects are linear"


RECENCY = {  # domain 2 is the target and gains from coming last, domain 0 loses a little by it
    "order": (-0.1, -0.1, 0.2),
    "recency": (-0.04, 0.01, 0.3),
    "recency_se": (0.002, 0.002, 0.03),
    "recency_dof": 5,
    "domain_losses": (3.0, 4.0, 2.0),
    "target": (0.0, 0.0, 1.0),
    "score": (0, 0, 0),
    "rate": 1.0,
    "loss": 2.0,
}


def test_finish_waits_for_the_last_two_windows_and_gives_back_in_the_last():
    """The order takes all of domain 2, half of that at most: 0.5 x (0.2 / 0.2) units of it, the other way round."""
    wish = LAWS["finish"]
    assert not wish(situation(**RECENCY, samples_left=201)).active
    assert not wish(situation(**RECENCY, samples_left=100)).active
    free = {**RECENCY, "harm": 1.0}
    found = wish(situation(**free, samples_left=200))
    np.testing.assert_allclose(found.weights, [0.55, 0.35, 0.1], atol=1e-12)
    assert (found.expected, found.expected_se, found.dof) == (pytest.approx(-0.15), pytest.approx(0.015), 5)
    rest = np.array([100, 60, 40]) - 100 * found.weights
    last = decide("finish", situation(tuple(found.weights), remaining=rest, **free, samples_left=100))
    np.testing.assert_allclose(last.weights, [0.45, 0.25, 0.3], atol=1e-9)
    turned = wish(situation(**{**free, "recency": (0.04, -0.01, -0.3)}, samples_left=200))
    np.testing.assert_allclose(turned.weights, [0.45, 0.25, 0.3], atol=1e-12)


def test_finish_stops_where_another_domain_would_lose_too_much():
    """Domain 0 loses 0.04 a unit and, at five degrees of freedom and 95 %, 2.5706 errors of 0.002; it may lose 0.006."""
    s = situation(**RECENCY, samples_left=200, harm=0.002)
    moved = 0.006 / (0.04 + 2.570582 * 0.002)
    np.testing.assert_allclose(
        LAWS["finish"](s).weights, [0.5 + 0.1 * moved, 0.3 + 0.1 * moved, 0.2 - 0.2 * moved]
    )
    blind = situation(**{**RECENCY, "recency_se": (0.1,) * 3}, samples_left=200)
    assert LAWS["finish"](blind).active and not LAWS["finish"](situation(
        **{**RECENCY, "recency_se": (0.2,) * 3}, samples_left=200)).active, "0.3 against 2.57 errors"  # fmt: skip
    assert decide("finish", situation(**{**RECENCY, "loss": 2e4}, samples_left=200)).weights is None, (
        "the gate"
    )


def test_odm_is_exp3_as_published():
    """Two rounds by hand: reward = .1 L / w smoothed by .9, eps_t = min(1/K, sqrt(ln K / (K t)))."""
    s = situation((0.5, 0.3, 0.2), losses=(3.0, 2.0, 4.0), score=(0, 0, 0))
    first = LAWS["odm"](s)
    reward = 0.1 * np.array([3 / 0.5, 2 / 0.3, 4 / 0.2])
    eps = [min(1 / 3, np.sqrt(np.log(3) / (3 * t))) for t in (1, 1, 2)]
    power = np.exp(eps[0] * reward)
    np.testing.assert_allclose(first.weights, (1 - 3 * eps[1]) * power / power.sum() + eps[1], rtol=1e-12)
    memory = json.loads(json.dumps(first.memory))
    second = LAWS["odm"](
        situation(tuple(first.weights), losses=(3.0, 2.0, 4.0), score=(0, 0, 0), memory=memory)
    )
    reward = 0.9 * reward + 0.1 * np.array([3.0, 2.0, 4.0]) / first.weights
    power = np.exp(eps[1] * reward)
    np.testing.assert_allclose(second.weights, (1 - 3 * eps[2]) * power / power.sum() + eps[2], rtol=1e-12)
    assert second.memory["turn"] == 2 and second.expected is None


def test_a_law_that_predicts_acts_only_above_its_error_and_above_the_gate():
    """One effect of -1 nats per unit of weight: 0.1 of the weight moves, so 0.1 + 0.1 is expected of the one window."""
    given = {
        "effect": (-1.0, 1.0),
        "effect_se": (0.01, 0.01),
        "effect_dof": 30,
        "score": (0, 0),
        "rate": 1.0,
        "loss": 3.0,
    }
    decision = decide("response", situation((0.5, 0.5), **given))
    np.testing.assert_allclose(decision.weights, [0.6, 0.4])
    assert decision.expected == pytest.approx(-0.2)
    assert decision.expected_se == pytest.approx(0.01 * np.hypot(0.1, 0.1))
    below = decide("response", situation((0.5, 0.5), **given | {"gate": 0.4}))
    assert below.weights is None and "below 0.4 of the loss" in below.reason
    acting = decide("response", situation((0.5, 0.5), **given | {"gate": 0.4, "memory": decision.memory}))
    np.testing.assert_allclose(acting.weights, [0.6, 0.4], err_msg="what has begun is carried out")
    noisy = situation((0.5, 0.5), **given | {"effect_se": (0.3, 1e3)})
    assert decide("response", noisy).expected is None or decide("response", noisy).weights is not None


def test_cooldown_freeze_and_frozen_weights():
    given = {"score": (2.0, -2.0), "rate": 1.0}
    resting = decide("tilt", situation((0.5, 0.5), **given, decisions_since_change=0))
    assert resting.weights is None and "cool-down" in resting.reason
    assert decide("tilt", situation((0.5, 0.5), **given, decisions_since_change=1)).weights is not None
    assert (
        decide("tilt", situation((0.5, 0.5), **given, decisions_since_change=1, cooldown=2)).weights is None
    )
    stopped = decide("tilt", situation((0.5, 0.5), **given, freeze=0.8, progress=0.8))
    assert stopped.weights is None and "the law stops at 0.8" in stopped.reason
    frozen = decide("tilt", situation((0.6, 0.4), remaining=(500, 500), **given, frozen=True))
    assert frozen.weights is None and "frozen" in frozen.reason
    owed = decide(
        "tilt", situation((0.6, 0.4), remaining=(5, 95), samples_left=100, window=50, **given, frozen=True)
    )
    np.testing.assert_allclose(owed.weights, [0.1, 0.9], err_msg="budgets win over a freeze")


def test_the_end_phase_has_its_own_mixture_and_its_samples_are_set_aside():
    """1000 of 2000 samples left, the last 200 at .1 .9: 20 and 180 are kept back from whatever the law wants."""
    given = {"score": (-2.0, 2.0), "rate": 1.0, "progress": 0.5, "end_share": 0.1, "end_weights": (0.1, 0.9)}
    early = situation((0.5, 0.5), window=800, **given)
    np.testing.assert_allclose(decide("tilt", early).weights, [0.6, 0.4])
    late = situation((0.6, 0.4), remaining=(20, 180), samples_left=200, **given | {"progress": 0.9})
    decision = decide("tilt", late)
    np.testing.assert_allclose(decision.weights, [0.1, 0.9])
    assert decision.reason.startswith("the end phase")
    short = situation(
        (0.6, 0.4), remaining=(80, 120), samples_left=200, **given | {"progress": 0.9, "window": 200}
    )
    np.testing.assert_allclose(decide("tilt", short).weights, [0.4, 0.6], err_msg="budgets permitting")
    planned = situation((0.6, 0.4), **given | {"progress": 0.95, "end_weights": None})
    assert decide("tilt", planned).weights is None, "without weights of its own it is the planned mixture"
