"""Decisions: the wish of a law (laws.py), cut to what budgets, guardrails and its own error allow. Pure functions.

A law proposes; the guardrails common to all laws decide how much of the wish is granted. Budgets are kept as bounds on the
weights of the coming window, so a decision never leaves more of a domain than the samples after it can carry.
"""

import dataclasses

import numpy as np

from megatron_commute.feasible import nearest
from megatron_commute.laws import LAWS, MEASURED, Wish, remaining_shares, shares_of, significant

__all__ = ["LAWS", "Decision", "Situation", "bounds", "decide", "remaining_shares", "significant"]
DEAD_BAND = 1e-3  # smaller moves are not worth a change


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a decision may look at, as it will be when it takes effect. K domains.

    weights f64[K] in force; remaining f64[K] samples left of each budget, NaN for endless domains; initial f64[K], the
    planned weights (they share out what the budgets leave to endless domains); samples_left: to the end of the run;
    window: samples until the next decision; score, score_se f64[K] (score > 0: delay); dof: replicates - 1; minimum,
    maximum f64[K]: the domains' own bounds, kept to the end; floors, caps f64[K]: bounds of what a law may ask; rate: the
    largest change of one weight; confidence: of the two-sided interval outside which a score counts; strength of the law.

    Signals of some laws: target f64[K], shares of the target; losses f64[K], mean training loss of each domain since the
    last decision, nats; effect, effect_se f64[K], effect_dof: measured change of the target loss, judged after a common
    tail, per unit of weight moved onto domain k now and given back later, relative to the mixture (negative: earlier
    helps); recency, recency_se f64[K], recency_dof: change of every domain's own loss, read without a tail, when weights
    move by `order` f64[K] now and back in the next window; domain_losses f64[K]: held-out, nats; scheduled f64[K], the
    schedule's weights for this window; loss: target loss, nats;
    memory: what the law's last decision asked to keep.

    Guardrails: decisions_since_change: decisions since the last one that changed the weights (0: that was the last one);
    cooldown: decisions to rest after a change; progress: samples used / samples in all; freeze: part of the run at whose
    end the law stops; frozen: the weights stay, whatever the law says; end_share, end_weights f64[K]: last part of the run
    and its mixture (None: the planned one); gate: least expected gain as a part of the loss, for laws that predict; harm:
    largest expected loss of a domain outside the target, as a part of its loss, that law `finish` may cause.
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
    target: np.ndarray | None = None
    losses: np.ndarray | None = None
    effect: np.ndarray | None = None
    effect_se: np.ndarray | None = None
    effect_dof: int = 1
    order: np.ndarray | None = None
    recency: np.ndarray | None = None
    recency_se: np.ndarray | None = None
    recency_dof: int = 1
    domain_losses: np.ndarray | None = None
    scheduled: np.ndarray | None = None
    loss: float | None = None
    memory: dict = dataclasses.field(default_factory=dict)
    decisions_since_change: int = 2**31
    cooldown: int = 1
    progress: float = 0.0
    freeze: float = 1.0
    frozen: bool = False
    end_share: float = 0.0
    end_weights: np.ndarray | None = None
    gate: float = 5e-4
    harm: float = 2e-3


@dataclasses.dataclass(frozen=True)
class Decision:
    """weights f64[K] for the coming window, or None where the weights stay as they are; reason: one sentence.

    expected, expected_se: predicted change of the final target loss, nats, negative: better; None where the law does not
    predict. memory: a JSON-able dict that the law wants in the next Situation.
    """

    weights: np.ndarray | None
    reason: str
    expected: float | None = None
    expected_se: float | None = None
    memory: dict = dataclasses.field(default_factory=dict)


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


def before_the_end(situation):
    """(Situation without the samples that the end phase will need, its weights f64[K], whether it has begun).

    The end phase begins with the decision whose window lies mostly in the last `end_share` of the run. Before it, what its
    mixture needs of every budget is set aside, so that no law can spend it.
    """
    s = situation
    weights = s.initial if s.end_weights is None else np.asarray(s.end_weights, dtype=np.float64)
    total = s.samples_left / max(1.0 - s.progress, 1e-12)
    samples = min(s.end_share * total, s.samples_left)
    if samples <= 0:
        return s, weights, False
    if s.samples_left - samples < min(s.window, s.samples_left) / 2:
        return s, weights, True
    rest = np.where(np.isnan(s.remaining), np.nan, np.maximum(s.remaining - samples * weights, 0.0))
    left = s.samples_left - samples
    owed = np.nansum(rest)
    if (
        owed > left
    ):  # the budgets do not permit the end asked for: nothing may be set aside beyond what they leave
        rest = rest * (left / owed)
    return dataclasses.replace(s, remaining=rest, samples_left=left), weights, False


def within(whole, before):
    """`bounds` of the `whole` Situation, narrowed to those `before` its end phase where the budgets permit both."""
    low, high, relaxed = bounds(whole)
    if before is whole:
        return low, high, relaxed
    inner, outer, _ = bounds(before)
    inner, outer = np.clip(inner, low, high), np.clip(outer, low, high)
    return (inner, outer, relaxed) if inner.sum() <= 1 <= outer.sum() else (low, high, relaxed)


def doubt(wish, situation):
    """Why a predicted gain does not count, or None: it must exceed its own error and, for a law that was not acting before,
    `gate` of the loss (at the end of the run, where the law predicts that)."""
    from scipy.special import ndtri, stdtrit

    s = situation
    if wish.expected is None:
        return None
    level = 0.5 + s.confidence / 2
    quantile = ndtri(level) if wish.dof is None else stdtrit(wish.dof, level)
    if (
        not np.isfinite([wish.expected, wish.expected_se]).all()
        or -wish.expected <= quantile * wish.expected_se
    ):
        return f"the expected change {wish.expected:+.2g} is inside its error"
    loss = s.loss if wish.loss is None else wish.loss
    acting = s.memory.get("acting", False)  # what is left to gain shrinks as a plan is carried out
    if loss is not None and not acting and -wish.expected < s.gate * abs(loss):
        return f"the expected gain {-wish.expected:.2g} is below {s.gate:g} of the loss"
    return None


def wished(law, situation):
    """The Wish of `law`, with the gate, the cool-down and the freeze applied."""
    s = situation
    wish, shares = (law if callable(law) else LAWS[law])(s), shares_of(s)
    if s.frozen:
        return wish._replace(weights=s.weights.copy(), active=False, why="the weights are frozen")
    if s.progress >= s.freeze:
        return wish._replace(weights=shares, active=False, why=f"the law stops at {s.freeze:g} of the run")
    if law in MEASURED and s.decisions_since_change < s.cooldown:
        return wish._replace(weights=s.weights.copy(), active=False, why="cool-down after the last change")
    if not wish.active:
        return wish
    why = doubt(wish, s)
    if why is not None:
        return wish._replace(weights=shares, active=False, why=why)
    return wish


def decide(law, situation):
    """The decision of `law` in a Situation, guardrails applied; the same situation, the same decision.

    law: a name in LAWS, or a function Situation -> Wish, which does not rest after a change.
    """
    if situation.samples_left <= 0:
        return Decision(
            None, "the run ends before new weights could take effect", memory=dict(situation.memory)
        )
    s, last, ending = before_the_end(situation)
    wish = wished(law, s)
    if ending and not s.frozen:  # people's freeze outranks the end that was planned
        wish = wish._replace(weights=last, active=True, why="the end phase")
    low, high, relaxed = within(situation, s)
    asked = wish.weights
    if relaxed:  # the budgets get what they need, the law no more than the guardrails allow
        asked = np.clip(asked, *guardrails(s))
    weights = granted(asked, low, high, np.isnan(s.remaining), *endless_share(situation))
    moved = float(np.abs(weights - s.weights).max())
    memory = dict(wish.memory or {}) | ({"acting": True} if wish.active and wish.expected is not None else {})
    told = {"expected": wish.expected, "expected_se": wish.expected_se, "memory": memory}
    # a sample more or less of a budget moves its share by 1 / samples_left
    if moved < max(DEAD_BAND, 1.5 / situation.samples_left):
        why = "the wish is no further than rounding" if wish.active else _quiet(wish)
        return Decision(None, f"weights stay: {why}", **told)
    stays = wish.active or np.array_equal(wish.weights, s.weights)
    why = wish.why if stays else f"back to the remaining-budget shares: {wish.why}"
    if relaxed or moved > s.rate + 1e-9:
        why += "; the budgets ask for more than the rate limit, floors or caps allow, and budgets win"
    elif np.abs(weights - asked).max() > DEAD_BAND:
        why += "; the wish is limited by rate, floors, caps or budgets"
    return Decision(weights, why, **told)


def _quiet(wish: Wish) -> str:
    return "every score is inside its error bar" if wish.why == "no score outside its error bar" else wish.why
