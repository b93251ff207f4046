"""Laws: what weights a method wishes for the coming window. Pure functions of a Situation, one
signature.

law(situation) -> Wish. A law knows neither floors, caps nor rate limits: the guardrails of
controller.py are common to all and decide how much of a wish is granted. What a law does without
a signal is nothing: its wish is then the remaining-budget shares, under which every budget runs
out exactly at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megatron_commute.decide import flow
from megatron_commute.feasible import owed_shares
from megatron_commute.intervals import student
from megatron_commute.settings.yaml_checks import did_you_mean

ODM_SMOOTHING = 0.9  # of the moving average of rewards, as published


class Wish(NamedTuple):
    """What a law asks for."""

    weights: np.ndarray
    """f64[K]"""
    active: bool
    """whether it is more than the remaining-budget shares"""
    why: str
    """one clause"""
    memory: dict | None = None
    """JSON values for the next decision"""
    course: np.ndarray | None = None
    """f64[M, K] of every segment of what is left, of a law that sees so far; weights are their
    mean over the window"""


def left_evenly(mixture, initial):
    """The remaining-budget shares f64[K] of a mixture.Mixture, to its end; initial f64[K]: the
    planned weights.
    """
    budgets = np.array([np.nan if budget is None else budget for budget in mixture.budgets], dtype=np.float64)
    return owed_shares(budgets - mixture.served, mixture.samples - mixture.index, initial)


def shares_of(situation):
    """The remaining-budget shares f64[K] of a Situation: the mixture that every law is judged
    against.
    """
    return owed_shares(situation.remaining, situation.samples_left, situation.initial)


def significant(score, score_se, dof, confidence):
    """bool[K]: where a score lies outside its two-sided Student interval. A score without a
    finite error never does.
    """
    quantile = student(dof, confidence)
    finite = np.isfinite(score) & np.isfinite(score_se)
    return finite & (np.abs(score) > quantile * np.where(finite, score_se, np.inf))


def hold(situation):
    """The planned mixture: the remaining-budget shares, whatever was measured."""
    return Wish(shares_of(situation), False, "the planned mixture")


def schedule(situation):
    """The weights that a schedule, of a file or of law flow, names for this window; else the
    remaining-budget shares.
    """
    if situation.scheduled is None:
        return hold(situation)
    return Wish(np.asarray(situation.scheduled, dtype=np.float64), True, "the schedule's weights")


def planned_again(situation):
    """Law flow: what it would plan for what is left. It needs no measurement, so no error bar
    holds it back.

    Without a profile (mode fixed) its plan is followed as a schedule is. Floors and caps give way
    to what is owed.
    """
    s = situation
    if s.profile is None:
        return schedule(s)
    shares = shares_of(s)
    if s.target is None or not np.isfinite(s.target).all():
        return Wish(shares, False, "no target to plan for")
    reach = flow.ranges(s.target, s.shares, s.strength)
    due = s.owed / s.owed.sum()
    low = np.minimum(np.maximum(s.minimum, s.floors), due)
    high = np.maximum(np.minimum(s.maximum, s.caps), due)
    course, notes = flow.rest_weights(
        s.shares * np.exp(np.outer(s.profile, reach)), s.segments, s.owed, low, high, s.kept
    )
    notes = (flow.SAME_TARGET,) if not np.ptp(reach) > 0 else notes
    window = np.searchsorted(np.cumsum(s.segments), min(s.window, s.samples_left)) + 1
    mean = s.segments[:window] @ course[:window] / s.segments[:window].sum()
    why = f"flow of what is left: profile {s.profile[0]:.2g} now, {s.profile.max():.2g} at most to come"
    return Wish(mean, not notes, notes[0] if notes else why, course=course)


def proportional(situation):
    """In proportion to what is left: a budget counts with its rest, endless domains share the
    rest of the run equally.

    Where every domain has a budget this is `hold`; endless domains lose their planned weights.
    """
    s = situation
    equal = owed_shares(s.remaining, s.samples_left, np.ones_like(s.initial))
    return Wish(equal, bool(np.isnan(s.remaining).any()), "in proportion to what is left")


def excess_first(rest, target):
    """(samples, excess f64[K]): how long budgets of `rest` f64[K] samples last beyond a tail in
    the proportions of `target` f64[K] (sum 1), as long a tail as they carry, and what of each
    domain is used before it.
    """
    asked = target > 0
    tail = min(float((rest[asked] / target[asked]).min()), float(rest.sum()))
    return float(rest.sum()) - tail, np.maximum(rest - tail * target, 0.0)


def tau_tail(situation):
    """Excess budgets first, then the target's own mixture for as long as the budgets carry it.
    Needs no measurement.

    For horizons much longer than 1 / (smallest curvature) the start is forgotten and only the
    mixture of the end counts; over short horizons it harms. With budgets in the target's
    proportions it is `hold`.
    """
    s, shares = situation, shares_of(situation)
    if s.target is None or not np.isfinite(s.target).all() or not (s.target > 0).any():
        return Wish(shares, False, "no target to end on")
    target = s.target / s.target.sum()
    rest = shares * s.samples_left
    first, excess = excess_first(rest, target)
    if first < 1:
        return Wish(shares, False, "the budgets left are the target's own mixture")
    window = min(s.window, s.samples_left)
    used = excess * min(window / first, 1.0) + target * max(window - first, 0.0)
    return Wish(
        used / used.sum(), True, f"excess budgets first, the target's mixture after {first:.0f} samples"
    )


def tilted(shares, score, strength):
    """shares f64[K] tilted against the score: w_k ~ shares_k exp(-strength score_k /
    max|score|).
    """
    largest = np.abs(score).max()
    if largest == 0:
        return shares.copy()
    result = shares * np.exp(-strength * score / largest)
    return result / result.sum()


def tilt(situation):
    """The paper's criterion (Rukhovich et al., arXiv 2501.15556, Corollary 3.2) turned into a
    law: domains that should wait get less now, and by their budgets more later.

    It looks one window ahead only; over long horizons it can harm (see README, limits). Scores
    inside their error bars count as zero.
    """
    s = situation
    counts = significant(s.score, s.score_se, s.dof, s.confidence)
    wish = tilted(shares_of(s), np.where(counts, s.score, 0.0), s.strength)
    if not counts.any():
        return Wish(wish, False, "no score outside its error bar")
    return Wish(wish, True, f"{int(counts.sum())} of {len(counts)} scores outside their error bars")


def odm(situation):
    """Online Data Mixing (Albalak et al., arXiv 2312.02406): EXP3 with training losses as
    rewards; knows no budgets.

    reward_k <- a reward_k + (1 - a) L_k / w_k with a = 0.9, eps_t = min(1/K, sqrt(ln K / (K
    t))), w = (1 - K eps_t) softmax(eps_{t-1} reward) + eps_t. A baseline: it never predicts and
    knows no error.
    """
    s, K = situation, len(situation.weights)
    turn = int(s.memory.get("turn", 0))
    reward = np.array(s.memory.get("reward", [0.0] * K), dtype=np.float64)
    if s.losses is None or not np.isfinite(s.losses).all() or reward.shape != (K,):
        return Wish(shares_of(s), False, "no training loss of every domain yet", memory=dict(s.memory))
    played = np.maximum(
        s.weights, 1e-3
    )  # the published reward divides by the weight; a domain at rest would explode
    reward = ODM_SMOOTHING * reward + (1 - ODM_SMOOTHING) * s.losses / played
    before, now = (min(1 / K, np.sqrt(np.log(K) / (K * t))) for t in (max(turn, 1), turn + 1))
    power = np.exp(before * (reward - reward.max()))
    weights = (1 - K * now) * power / power.sum() + now
    memory = {"turn": turn + 1, "reward": reward.tolist()}
    return Wish(weights / weights.sum(), True, "the bandit's mixture of training losses", memory=memory)


class Law(NamedTuple):
    """One law: its function, and what a run must have for it."""

    function: Callable
    """Situation -> Wish"""
    needs: tuple = ()
    """fields of a Situation without which it only holds"""
    measured: bool = False
    """acts on a measured signal: rests after a change, and is loud while nothing calibrates it"""
    planned: bool = False
    """weights are planned before the run (flow_run.py); a decision of mode act plans what is left,
    whatever a probe measured"""


LAWS = {
    "hold": Law(hold),
    "schedule": Law(schedule, needs=("scheduled",)),
    "flow": Law(planned_again, planned=True),
    "proportional": Law(proportional),
    "tau-tail": Law(tau_tail, needs=("target",)),
    "tilt": Law(tilt, needs=("score", "score_se"), measured=True),
    "odm": Law(odm, needs=("losses",), measured=True),
}
CURES = {"scheduled": "write schedule: FILE and mode: fixed", "target": "write the target as shares"}


def check(config):
    """Raises ConfigError for a law, or one to compare with, that is unknown or whose signal this
    run does not have.
    """
    chosen = config.controller
    missing = {
        "scheduled": config.schedule is None,
        "target": config.target == "each" and config.mode == "act",
    }
    for key, names in (("law", (chosen.law,)), ("compare", chosen.compare)):
        for name in names:
            if name not in LAWS:
                cure = f"write one of {', '.join(LAWS)}{did_you_mean(name, LAWS)}"
                raise config.error(f"controller.{key}", f"got {name}", cure)
            for need in LAWS[name].needs:
                if missing.get(need):
                    problem = f"{name} needs `{need}`, which this run does not have"
                    raise config.error(f"controller.{key}", problem, CURES[need])
            if LAWS[name].planned:
                _check_planned(config, key, name)


def _check_planned(config, key, name):
    """Refuses a planned law where it cannot plan."""
    if config.mode == "shadow" and key == "law":
        problem = f"{name} plans weights, which mode shadow leaves to the host"
        cure = "write mode: fixed or mode: act; compare: [flow] shows here what it would decide"
        raise config.error(f"controller.{key}", problem, cure)
    if config.schedule is not None and key == "law":
        raise config.error("schedule", f"law {name} plans the weights", "take it out, or write law: schedule")
    if config.target == "each":
        raise config.error("target", f"law {name} plans for one target", "write shares of the domains")
