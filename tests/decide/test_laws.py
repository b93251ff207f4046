"""Laws by their own formulas, worked out by hand or run against what they promise; properties of all in test_controller."""

import json

import numpy as np
from situations import situation

from megatron_commute.decide.controller import decide
from megatron_commute.decide.laws import LAWS


def test_every_law_says_what_it_needs_and_holds_without_it():
    assert set(LAWS) == {
        "hold", "schedule", "flow", "proportional", "tau-tail", "tilt", "odm",
    }  # fmt: skip
    s = situation((0.5, 0.3, 0.2), score=(np.nan,) * 3, score_se=(np.nan,) * 3)
    for name, law in LAWS.items():
        wish = law.function(s)
        np.testing.assert_allclose(wish.weights, [0.5, 0.3, 0.2], err_msg=name)
        assert not wish.active, name


def test_schedule_follows_the_file():
    assert LAWS["schedule"].function(situation(scheduled=(0.1, 0.2, 0.7))).weights.tolist() == [0.1, 0.2, 0.7]


def test_proportional_forgets_the_plan_of_endless_domains():
    s = situation((0.2, 0.6, 0.2), remaining=(400, np.nan, np.nan), score=(0, 0, 0))
    np.testing.assert_allclose(LAWS["proportional"].function(s).weights, [0.4, 0.3, 0.3])
    np.testing.assert_allclose(LAWS["hold"].function(s).weights, [0.4, 0.45, 0.15])


def test_tau_tail_spends_the_excess_first_and_ends_on_the_target():
    """600, 300, 100 of 1000 left, target thirds: the tail of 300 takes 100 each, so 500, 200, 0 come in the first 700."""
    s = situation(remaining=(600, 300, 100), target=(1 / 3, 1 / 3, 1 / 3), window=100)
    np.testing.assert_allclose(LAWS["tau-tail"].function(s).weights, [5 / 7, 2 / 7, 0], atol=1e-12)
    s = situation(remaining=(200, 150, 100), samples_left=450, target=(1 / 3, 1 / 3, 1 / 3), window=300)
    half = [(100 + 50) / 300, (50 + 50) / 300, 50 / 300]
    np.testing.assert_allclose(LAWS["tau-tail"].function(s).weights, half, atol=1e-12)
    at_end = situation(remaining=(100, 100, 100), samples_left=300, target=(1 / 3, 1 / 3, 1 / 3))
    assert not LAWS["tau-tail"].function(at_end).active
    only = situation(remaining=(600, 300, 100), target=(0.0, 0.0, 1.0))
    np.testing.assert_allclose(LAWS["tau-tail"].function(only).weights, [2 / 3, 1 / 3, 0], atol=1e-12)


def test_odm_is_exp3_as_published():
    """Two rounds by hand: reward = .1 L / w smoothed by .9, eps_t = min(1/K, sqrt(ln K / (K t)))."""
    s = situation((0.5, 0.3, 0.2), losses=(3.0, 2.0, 4.0), score=(0, 0, 0))
    first = LAWS["odm"].function(s)
    reward = 0.1 * np.array([3 / 0.5, 2 / 0.3, 4 / 0.2])
    eps = [min(1 / 3, np.sqrt(np.log(3) / (3 * t))) for t in (1, 1, 2)]
    power = np.exp(eps[0] * reward)
    np.testing.assert_allclose(first.weights, (1 - 3 * eps[1]) * power / power.sum() + eps[1], rtol=1e-12)
    memory = json.loads(json.dumps(first.memory))
    second = LAWS["odm"].function(
        situation(tuple(first.weights), losses=(3.0, 2.0, 4.0), score=(0, 0, 0), memory=memory)
    )
    reward = 0.9 * reward + 0.1 * np.array([3.0, 2.0, 4.0]) / first.weights
    power = np.exp(eps[1] * reward)
    np.testing.assert_allclose(second.weights, (1 - 3 * eps[2]) * power / power.sum() + eps[2], rtol=1e-12)
    assert second.memory["turn"] == 2


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
