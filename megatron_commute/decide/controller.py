"""Decisions: the wish of a law (laws.py), cut to what budgets and guardrails allow. Pure
functions.

A law proposes; the guardrails common to all laws decide how much of the wish is granted. Budgets
are kept as bounds on the weights of the coming window, so a decision never leaves more of a
domain than the samples after it can carry.
"""

import dataclasses

import numpy as np

from megatron_commute.decide.laws import LAWS, Wish, shares_of
from megatron_commute.feasible import nearest

DEAD_BAND = 1e-3  # smaller moves are not worth a change


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is done with the weights of the coming window."""

    weights: np.ndarray | None
    """f64[K], or None where they stay as they are"""
    reason: str
    """one sentence"""
    memory: dict = dataclasses.field(default_factory=dict)
    """JSON values that the law wants in the next Situation"""
    pieces: np.ndarray | None = None
    """f64[m, K] of the window's segments, where they do not share one vector of weights"""
    course: np.ndarray | None = None
    """f64[M, K] that the law wishes for every segment of what is left"""


def guardrails(situation):
    """Lowest and highest weight f64[K] that floors, caps and the rate limit allow, whatever the
    budgets need.
    """
    s = situation
    return np.maximum(s.floors, s.weights - s.rate), np.minimum(s.caps, s.weights + s.rate)


def bounds(situation):
    """Lowest and highest weight f64[K] of every domain in the coming window, and whether the
    rate limit had to give way.

    Within them: the domain's own minimum and maximum, floors and caps, the rate limit, and after
    the window a rest of every budget that its minimum and maximum can still serve to the end.
    """
    s = situation
    budgeted = ~np.isnan(s.remaining)
    hard_low, hard_high = servable(s)
    least, most = endless_share(s)
    soft_low, soft_high = guardrails(s)
    low = np.clip(soft_low, hard_low, hard_high)
    high = np.clip(np.maximum(soft_high, low), low, hard_high)
    feasible = low.sum() <= 1.0 + 1e-12 and high.sum() >= 1.0 - 1e-12
    if budgeted.any() and not budgeted.all():
        feasible &= low[~budgeted].sum() <= most + 1e-12 and high[~budgeted].sum() >= least - 1e-12
        feasible &= low[budgeted].sum() <= 1 - least + 1e-12 and high[budgeted].sum() >= 1 - most - 1e-12
    return (low, high, False) if feasible else (hard_low, hard_high, True)


def servable(situation):
    """Lowest and highest mean weight f64[K] of the coming window after which the domain's own
    bounds can still serve the rest of every budget.
    """
    s = situation
    window = min(s.window, s.samples_left)
    later = s.samples_left - window
    budgeted = ~np.isnan(s.remaining)
    rest = np.where(budgeted, s.remaining, 0.0)
    endless_minimum = s.minimum[~budgeted].sum()
    ceiling = np.minimum(s.maximum, 1.0 - endless_minimum)
    low = np.where(budgeted, np.maximum(s.minimum, (rest - ceiling * later) / window), s.minimum)
    high = np.where(budgeted, np.minimum(s.maximum, (rest - s.minimum * later) / window), s.maximum)
    low, high = np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)
    return np.minimum(low, high), high


def endless_share(situation):
    """Lowest and highest weight of all endless domains together in the coming window, so that
    the samples after it are neither more nor fewer than budgets and endless domains can still
    fill.
    """
    s = situation
    window = min(s.window, s.samples_left)
    later = s.samples_left - window
    endless = np.isnan(s.remaining)
    spare = s.samples_left - s.remaining[~endless].sum()
    least = (spare - min(1.0, s.maximum[endless].sum()) * later) / window
    most = (spare - s.minimum[endless].sum() * later) / window
    most = min(max(most, 0.0), 1.0)
    return min(max(least, 0.0), most), most


def granted(wish, low, high, endless, least, most):
    """The weights f64[K] nearest to `wish` within low and high whose total over `endless`
    bool[K] is in [least, most].
    """
    weights = nearest(wish, low, high)
    total = weights[endless].sum()
    share = min(max(total, least), most)
    if abs(share - total) > 1e-12 and endless.any() and not endless.all():
        for part, mass in ((endless, share), (~endless, 1.0 - share)):
            weights[part] = nearest(wish[part], low[part], high[part], mass)
    return weights


def wished(law, situation):
    """The Wish of `law`, with cool-down and freeze applied."""
    s = situation
    function, measured = (law, False) if callable(law) else (LAWS[law].function, LAWS[law].measured)
    wish, shares = function(s), shares_of(s)
    if s.frozen:
        return Wish(s.weights.copy(), False, "the weights are frozen", wish.memory)
    if s.progress >= s.freeze:
        return Wish(shares, False, f"the law stops at {s.freeze:g} of the run", wish.memory)
    if measured and s.decisions_since_change < s.cooldown:
        return wish._replace(weights=s.weights.copy(), active=False, why="cool-down after the last change")
    return wish


def decide(law, situation):
    """The decision of `law` in a Situation, guardrails applied; the same situation, the same
    decision.

    law: a name in LAWS, or a function Situation -> Wish, which does not rest after a change.
    """
    s = situation
    if s.samples_left <= 0:
        return Decision(None, "the run ends before new weights could take effect", dict(s.memory))
    if not callable(law) and LAWS[law].planned and s.profile is None:
        return Decision(None, f"weights follow the plan of law {law}", dict(s.memory))
    wish = wished(law, s)
    if wish.course is not None and (followed := _followed(s, wish)) is not None:
        return followed
    low, high, relaxed = bounds(s)
    asked = wish.weights
    if relaxed:  # the budgets get what they need, the law no more than the guardrails allow
        asked = np.clip(asked, *guardrails(s))
    weights = granted(asked, low, high, np.isnan(s.remaining), *endless_share(s))
    moved = float(np.abs(weights - s.weights).max())
    memory = dict(wish.memory or {})
    # a sample more or less of a budget moves its share by 1 / samples_left
    if moved < max(DEAD_BAND, 1.5 / s.samples_left):
        why = "the wish is no further than rounding" if wish.active else _quiet(wish)
        return Decision(None, f"weights stay: {why}", memory)
    stays = wish.active or np.array_equal(wish.weights, s.weights)
    why = wish.why if stays else f"back to the remaining-budget shares: {wish.why}"
    if relaxed or moved > s.rate + 1e-9:
        why += "; the budgets ask for more than the rate limit, floors or caps allow, and budgets win"
    elif np.abs(weights - asked).max() > DEAD_BAND:
        why += "; the wish is limited by rate, floors, caps or budgets"
    return Decision(weights, why, memory, course=wish.course)


def _followed(s, wish):
    """The Decision of a wish for every segment of what is left: those of the window, each within
    the rate limit. None where budgets then ask for more: one vector of weights has to do.
    """
    sizes = s.segments[: np.searchsorted(np.cumsum(s.segments), min(s.window, s.samples_left)) + 1]
    asked = wish.course[: len(sizes)]
    soft_low, soft_high = guardrails(s)
    low, high = np.maximum(s.minimum, soft_low), np.minimum(s.maximum, soft_high)
    told, why, memory = asked, wish.why, dict(wish.memory or {})
    if (np.abs(asked - s.weights) > s.rate + 1e-12).any():
        if (low > high).any() or low.sum() > 1 or high.sum() < 1:
            return None
        told, why = np.array([nearest(row, low, high) for row in asked]), f"{why}; limited by the rate"
        mean, endless = sizes @ told / sizes.sum(), np.isnan(s.remaining)
        least, most = endless_share(s)
        hard_low, hard_high = servable(s)
        slack = 1.0 / sizes.sum()  # one sample, which the mixture's own rounding moves anyway
        if (mean < hard_low - slack).any() or (mean > hard_high + slack).any():
            return None
        if endless.any() and not least - slack <= mean[endless].sum() <= most + slack:
            return None
    if np.abs(told - s.weights).max() <= 1e-12:
        return Decision(None, f"weights stay: {why}", memory, course=wish.course)
    return Decision(told[0], why, memory, told, wish.course)


def _quiet(wish: Wish) -> str:
    return "every score is inside its error bar" if wish.why == "no score outside its error bar" else wish.why


def decisions(laws, situation, memories):
    """{law: Decision} of every law on the same Situation, each with its own memory {law: dict}.

    A law that fails decides nothing and says so: a fault of ours never ends a run.
    """
    made = {}
    for law in laws:
        own = dataclasses.replace(situation, memory=memories.get(law, {}))
        try:
            made[law] = decide(law, own)
        except Exception as fault:  # the same on every rank, since all look at the same numbers
            made[law] = failed(fault, dict(own.memory))
    return made


def failed(fault, memory=None):
    """The Decision that stands for one that ended with an exception: nothing moves, and the
    record says why.
    """
    why = f"weights stay: the controller failed, please report it: {type(fault).__name__}: {fault}"
    return Decision(None, why, memory or {})
