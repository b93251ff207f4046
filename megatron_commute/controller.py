"""Laws: the next domain weights from measured scores, remaining budgets and guardrails. Pure functions.

A law proposes; the guardrails common to all laws decide how much of the wish is granted. Budgets are kept as bounds on the
weights of the coming window, so a decision never leaves more of a domain than the samples after it can carry.
"""

import dataclasses

import numpy as np

from megatron_commute.mixture import nearest

DEAD_BAND = 1e-3  # smaller moves are not worth a change


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a decision may look at, as it will be when it takes effect. K domains.

    weights f64[K] in force; remaining f64[K] samples left of each budget, NaN for endless domains; initial f64[K], the
    planned weights (they share out what the budgets leave to endless domains); samples_left: to the end of the run;
    window: samples until the next decision; score, score_se f64[K] (score > 0: delay); dof: replicates - 1; minimum,
    maximum f64[K]: the domains' own bounds, kept to the end; floors, caps f64[K]: bounds of what a law may ask; rate: the
    largest change of one weight; confidence: of the two-sided interval outside which a score counts; strength of the law.
    """

    weights: np.ndarray
    remaining: np.ndarray
    initial: np.ndarray
    samples_left: int
    window: int
    score: np.ndarray
    score_se: np.ndarray
    dof: int
    minimum: np.ndarray
    maximum: np.ndarray
    floors: np.ndarray
    caps: np.ndarray
    rate: float
    confidence: float
    strength: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """weights f64[K] for the coming window, or None where the weights stay as they are; reason: one sentence."""

    weights: np.ndarray | None
    reason: str


def remaining_shares(remaining, samples_left, initial):
    """Weights f64[K] that would use up every budget exactly at the end; endless domains (NaN) share the rest as planned."""
    endless = np.isnan(remaining)
    shares = np.where(endless, 0.0, remaining) / samples_left
    rest = max(0.0, 1.0 - shares.sum())
    if endless.any():
        planned = np.where(endless, np.maximum(initial, 1e-12), 0.0)
        shares = shares + rest * planned / planned.sum()
    return shares / shares.sum()


def significant(score, score_se, dof, confidence):
    """bool[K]: where a score lies outside its two-sided Student interval. A score without a finite error never does."""
    from scipy.special import stdtrit

    quantile = stdtrit(dof, 0.5 + confidence / 2)
    finite = np.isfinite(score) & np.isfinite(score_se)
    return finite & (np.abs(score) > quantile * np.where(finite, score_se, np.inf))


def tilt(shares, score, strength):
    """shares f64[K] tilted against the score: w_k ~ shares_k exp(-strength score_k / max|score|).

    The paper's criterion (Corollary 3.2) turned into a law: domains that should wait get less now, and by their budgets
    more later. It looks one window ahead only; over long horizons this can harm (see README, limits).
    """
    largest = np.abs(score).max()
    if largest == 0:
        return shares.copy()
    tilted = shares * np.exp(-strength * score / largest)
    return tilted / tilted.sum()


def hold(shares, score, strength):
    """The planned mixture: the remaining-budget shares, whatever was measured."""
    return shares.copy()


LAWS = {"hold": hold, "tilt": tilt}


def guardrails(situation):
    """Lowest and highest weight f64[K] that floors, caps and the rate limit allow, whatever the budgets need."""
    s = situation
    return np.maximum(s.floors, s.weights - s.rate), np.minimum(s.caps, s.weights + s.rate)


def bounds(situation):
    """Lowest and highest weight f64[K] of every domain in the coming window, and whether the rate limit had to give way.

    Within them: the domain's own minimum and maximum, floors and caps, the rate limit, and after the window a rest of every
    budget that its minimum and maximum can still serve to the end.
    """
    s = situation
    window = min(s.window, s.samples_left)
    later = s.samples_left - window
    budgeted = ~np.isnan(s.remaining)
    rest = np.where(budgeted, s.remaining, 0.0)
    endless_minimum = s.minimum[~budgeted].sum()
    ceiling = np.minimum(s.maximum, 1.0 - endless_minimum)
    hard_low = np.where(budgeted, np.maximum(s.minimum, (rest - ceiling * later) / window), s.minimum)
    hard_high = np.where(budgeted, np.minimum(s.maximum, (rest - s.minimum * later) / window), s.maximum)
    hard_low, hard_high = np.clip(hard_low, 0.0, 1.0), np.clip(hard_high, 0.0, 1.0)
    hard_low = np.minimum(hard_low, hard_high)
    least, most = endless_share(s)
    soft_low, soft_high = guardrails(s)
    low = np.clip(soft_low, hard_low, hard_high)
    high = np.clip(np.maximum(soft_high, low), low, hard_high)
    feasible = low.sum() <= 1.0 + 1e-12 and high.sum() >= 1.0 - 1e-12
    if budgeted.any() and not budgeted.all():
        feasible &= low[~budgeted].sum() <= most + 1e-12 and high[~budgeted].sum() >= least - 1e-12
        feasible &= low[budgeted].sum() <= 1 - least + 1e-12 and high[budgeted].sum() >= 1 - most - 1e-12
    return (low, high, False) if feasible else (hard_low, hard_high, True)


def endless_share(situation):
    """Lowest and highest weight of all endless domains together in the coming window, so that the samples after it are
    neither more nor fewer than budgets and endless domains can still fill."""
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
    """The weights f64[K] nearest to `wish` within low and high whose total over `endless` bool[K] is in [least, most]."""
    weights = nearest(wish, low, high)
    total = weights[endless].sum()
    share = min(max(total, least), most)
    if abs(share - total) > 1e-12 and endless.any() and not endless.all():
        for part, mass in ((endless, share), (~endless, 1.0 - share)):
            weights[part] = nearest(wish[part], low[part], high[part], mass)
    return weights


def decide(law, situation):
    """The decision of `law` (a name in LAWS) in a Situation, guardrails applied."""
    s = situation
    if s.samples_left <= 0:
        return Decision(None, "the run ends before new weights could take effect")
    counts = significant(s.score, s.score_se, s.dof, s.confidence)
    shares = remaining_shares(s.remaining, s.samples_left, s.initial)
    wish = LAWS[law](shares, np.where(counts, s.score, 0.0), s.strength)
    low, high, relaxed = bounds(s)
    if relaxed:  # the budgets get what they need, the law no more than the guardrails allow
        wish = np.clip(wish, *guardrails(s))
    weights = granted(wish, low, high, np.isnan(s.remaining), *endless_share(s))
    moved = float(np.abs(weights - s.weights).max())
    # a sample more or less of a budget moves its share by 1 / samples_left
    if moved < max(DEAD_BAND, 1.5 / s.samples_left):
        why = (
            "the wish is no further than rounding" if counts.any() else "every score is inside its error bar"
        )
        return Decision(None, f"weights stay: {why}")
    if counts.any() and law != "hold":
        why = f"{int(counts.sum())} of {len(counts)} scores outside their error bars"
    else:
        why = "back to the remaining-budget shares: no score outside its error bar"
    if relaxed or moved > s.rate + 1e-9:
        why += "; the budgets ask for more than the rate limit, floors or caps allow, and budgets win"
    elif np.abs(weights - wish).max() > DEAD_BAND:
        why += "; the wish is limited by rate, floors, caps or budgets"
    return Decision(weights, why)
