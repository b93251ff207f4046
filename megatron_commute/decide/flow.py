"""Law `flow`: where in a run a domain's samples count, from its learning rates alone.

A sample counts by the rate it is trained at and is forgotten with the flow (learning rate x steps)
that follows: p(n) = rate(n) / peak * exp(-memory * flow after n / total flow), scaled to 0..1 over
the run. The logarithm of each weight over its planned share rises by its own range times p; budgets
and bounds are then met exactly. K domains, T steps.
"""

import dataclasses
import itertools
import math

import numpy as np

from megatron_commute.feasible import nearest_schedule, owed_shares

# Measured on a small GPT at 6 to 46 tokens a parameter, targets with a domain of share 0.1, fresh
# paired seeds.
# influences are fitted by 1.5 to 3.25 in 250 to 2000 steps; 10 harms under a cosine
MEMORY = 2.5
KEPT_PART, KEPT_MOST = 0.1, 100  # early training needs every domain: 50 steps of 500, 100 of 2000 and of 8000
# of a domain with RATIO times the share of the samples in the target, over one outside it
RANGE = 3.5
RATIO = 10.0
SEGMENTS = 100  # at most, of a schedule
STRONGEST = 10.0
HARM = 0.005  # part of its loss that a domain outside the target lost at strength 1 in 500 steps, at most

SCALE_WORDS = {"peak": "peak", "total": "their sum", "low": "least p", "high": "greatest p"}
SAME_TARGET = (
    "the target weighs every domain by its share of the samples, so flow keeps the planned mixture: name "
    "the domain that should gain with the key target"
)
SAME_STEPS = "every step counts alike under these learning rates, so flow keeps the planned mixture"
NO_ROOM = "the bounds leave flow no room, so it keeps the planned mixture: widen min and max"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a run keeps in its state, as JSON numbers, so that its weights can be made again from
    any later sample.
    """

    peak: float
    # highest learning rate of the planned run
    total: float
    # its flow: the sum of its learning rates
    low: float
    # least p of its steps that are not kept
    high: float
    # greatest p of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """The weights of a run, or of the rest of it, by law flow."""

    changes: tuple[tuple[int, np.ndarray], ...]
    # (at_sample, weights f64[K]), as Mixture.schedule takes them
    edges: np.ndarray
    # steps i64[M + 1] between which `weights` hold
    weights: np.ndarray
    # f64[M, K]
    profile: np.ndarray
    # scaled p f64[T] of every step of the run; below 0 or above 1 only among those kept
    ranges: np.ndarray
    # f64[K]: by how much the logarithm of a weight rises while p goes from 0 to 1
    scale: Scale
    # to be kept in the state
    notes: tuple[str, ...]
    # why the planned mixture is kept, where it is


def kept_steps(train_iters: int) -> int:
    """First steps of a run that stay at the planned mixture."""
    return min(int(KEPT_PART * train_iters), KEPT_MOST)


def ranges(target, shares, strength: float = 1.0) -> np.ndarray:
    """Range f64[K] of each domain from its target f64[K] and the shares f64[K] of the samples; 0
    where these agree.

    One sample's influence on the target goes with target / share. Only differences of ranges count.
    """
    target, shares = np.asarray(target, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    if not (np.isfinite(target).all() and (target >= 0).all() and target.any()):
        raise ValueError(f"target {target.tolist()}: give finite numbers >= 0, at least one of them above 0")
    if not 0 < strength <= STRONGEST:
        raise ValueError(f"strength {strength}: write a number above 0, at most {STRONGEST:g}")
    for k in np.flatnonzero((target > 0) & (shares <= 0)):
        raise ValueError(
            f"domain {k} has a target but no samples: give it a budget or take it out of the target"
        )
    ratio = np.divide(target / target.sum(), shares, out=np.ones_like(shares), where=shares > 0)
    result = strength * RANGE / RATIO * (np.minimum(ratio, RATIO) - 1.0)
    return np.where(np.abs(result) > 1e-12, result, 0.0)


def strength_within(harm: float) -> float:
    """Strength, at most 1, at which no domain outside the target is to lose more than `harm` of
    its loss.

    The harm is about in proportion to the strength, while a quarter of it keeps a third of the
    gain and a half two thirds.
    """
    if not (math.isfinite(harm) and harm > 0):
        raise ValueError(f"harm {harm}: write a part of the loss above 0, such as {HARM}")
    return min(1.0, harm / HARM)


def influence(rates, memory: float, peak: float, total: float) -> np.ndarray:
    """p f64[T] before it is scaled, of the learning rates f64[T] of a run."""
    after = np.cumsum(rates[::-1])[::-1] - rates
    return rates / peak * np.exp(-memory * after / total)


def scale_of(rates, memory: float, kept: int) -> Scale:
    """The scale of a planned run with these learning rates f64[T]; its first `kept` steps are left
    out of the extremes.
    """
    rates = _checked(rates, memory, kept)
    peak, total = float(rates.max()), math.fsum(rates)
    p = influence(rates, memory, peak, total)[kept:]
    return Scale(peak=peak, total=total, low=float(p.min()), high=float(p.max()))


def _checked(rates, memory, kept):
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 1 or not (np.isfinite(rates).all() and (rates >= 0).all()):
        raise ValueError("law flow needs the learning rate of every step: give finite numbers >= 0")
    if not rates.any():
        raise ValueError("all learning rates are 0, so no step counts: set --lr, or choose law hold")
    if not (math.isfinite(memory) and memory >= 0):
        raise ValueError(f"memory {memory}: write a finite number >= 0")
    if not 0 <= kept < len(rates):
        raise ValueError(f"kept steps {kept} in a run of {len(rates)}: keep fewer than the run has")
    return rates


def check_scale(scale: Scale, rates, memory: float, kept: int) -> None:
    """ValueError when a run goes on with other learning rates than it was planned with."""
    now = dataclasses.asdict(scale_of(rates, memory, kept))
    for name, before in dataclasses.asdict(scale).items():
        if not math.isclose(before, now[name], rel_tol=1e-9, abs_tol=1e-12):
            word = SCALE_WORDS[name]
            raise ValueError(
                f"the mixture was planned under other learning rates ({word} {before:g}, now {now[name]:g}): "
                "restore their flags, or accept the change to plan the rest anew"
            )


def profile(rates, memory: float, scale: Scale) -> np.ndarray:
    """p f64[T] of every step, 0 to 1 over the planned run; 0 throughout where it does not vary."""
    width = scale.high - scale.low
    if width <= 1e-12 * scale.high:
        return np.zeros(len(rates))
    return (
        influence(np.asarray(rates, dtype=np.float64), memory, scale.peak, scale.total) - scale.low
    ) / width


def planned(
    *,
    rates,
    batches,
    budgets,
    weights,
    target,
    low,
    high,
    strength=1.0,
    memory=MEMORY,
    kept=None,
    scale=None,
    begin=0,
    used=None,
    reach=None,
    retired=0,
) -> FlowSchedule:
    """The schedule of a run whose steps have the learning rates f64[T] and take batches i64[T] of
    samples.

    budgets: samples of each domain, None for an endless one, which counts with its part of weights
    f64[K] in what the others leave. target, low, high f64[K]: of the target loss, and bounds of
    every weight. kept: first steps at the planned mixture, by default kept_steps. scale: of the
    state of a run that goes on. begin: first step to plan; used f64[K]: samples of each domain
    before it (those planned make the same weights again, those served the rest of a changed run);
    retired: samples before it of domains that have left. reach: ranges f64[K], not the target's.
    """
    batches = np.asarray(batches, dtype=np.int64)
    kept = kept_steps(len(batches)) if kept is None else kept
    rates = _checked(rates, memory, kept)
    _refuse(rates, batches, begin)
    shares = _shares(budgets, weights, int(batches.sum()))
    scale = scale_of(rates, memory, kept) if scale is None else scale
    reach = ranges(target, shares, strength) if reach is None else np.asarray(reach, dtype=np.float64)
    p = profile(rates, memory, scale)
    edges = segment_edges(len(rates), kept)
    whole = np.add.reduceat(p * batches, edges[:-1]) / np.add.reduceat(batches, edges[:-1])
    ahead = edges[1:] > begin
    edges = np.append(np.maximum(edges[:-1][ahead], begin), len(rates))
    sizes, owed = np.add.reduceat(batches, edges[:-1]), _owed(budgets, shares, batches, begin, used, retired)
    if begin:
        low, high = within_reach(owed, low, high)
    first = int(begin < kept)
    told, notes = rest_weights(shares * np.exp(np.outer(whole[ahead], reach)), sizes, owed, low, high, first)
    if not np.ptp(reach) > 0:
        notes = (SAME_TARGET,)
    elif not np.ptp(whole[ahead][first:]) > 0:
        notes = (SAME_STEPS,)
    return FlowSchedule(
        changes=changes_of((np.cumsum(batches) - batches)[edges[:-1]], told),
        edges=edges,
        weights=told,
        profile=p,
        ranges=reach,
        scale=scale,
        notes=notes,
    )


def _refuse(rates, batches, begin):
    if batches.shape != rates.shape or (batches < 1).any():
        raise ValueError("batches: give the samples of every step, each at least 1")
    if not 0 <= begin < len(rates):
        raise ValueError(f"step {begin} of a run of {len(rates)}: nothing is left to plan")


def _shares(budgets, weights, samples):
    """Planned part f64[K] of the samples: of a budget itself, of endless domains by weight from
    what is left.
    """
    endless = np.array([budget is None for budget in budgets])
    need = np.array([0.0 if budget is None else budget for budget in budgets])
    rest = samples - math.fsum(need)
    if rest < 0 or (rest > 0 and not endless.any()):
        raise ValueError(
            f"budgets of {need.sum():.0f} samples in a run of {samples}: change them, or give one domain none"
        )
    given = np.where(endless, np.asarray(weights, dtype=np.float64), 0.0)
    if rest > 0 and not given.sum() > 0:
        raise ValueError("no domain without a budget has a weight above 0: give one, or give budgets to all")
    return owed_shares(np.where(endless, np.nan, need), samples, given)


def segment_edges(steps, kept):
    """Steps at which segments begin, and the run's end: the kept ones, then at most SEGMENTS in all
    of about one length.
    """
    count = min(SEGMENTS - (kept > 0), steps - kept)
    inner = kept + np.arange(count + 1) * (steps - kept) // count
    return np.concatenate([[0], inner]) if kept else inner


def _owed(budgets, shares, batches, begin, used, retired):
    """Samples f64[K] that each domain is to get from step `begin` on."""
    total, left = int(batches.sum()), int(batches[begin:].sum())
    used = np.zeros(len(shares)) if used is None else np.asarray(used, dtype=np.float64)
    if abs(math.fsum(used) + retired - (total - left)) > 1e-6 * total:
        raise ValueError(
            f"{used.sum() + retired:.0f} samples used before step {begin}, which begins at {total - left}"
        )
    owed = shares * total - used
    endless = np.array([budget is None for budget in budgets])
    for k in np.flatnonzero(~endless & (owed < -1e-6 * total)):
        raise ValueError(f"domain {k} has used {used[k]:.0f} of a budget of {budgets[k]}: raise it")
    owed = np.maximum(owed, 0.0)
    spare = left - math.fsum(owed[~endless])
    if endless.any() and owed[endless].any():
        owed[endless] *= max(spare, 0.0) / math.fsum(owed[endless])
    return owed


def within_reach(owed, low, high):
    """The bounds, moved to what is owed where that misses them by less than K samples: served
    samples are whole ones.
    """
    left = math.fsum(owed)
    share, slack = owed / left, len(owed) / left
    low = np.where((share < low) & (share > low - slack), share, low)
    return low, np.where((share > high) & (share < high + slack), share, high)


def rest_weights(wish, sizes, owed, low, high, first):
    """(weights f64[M, K], notes): `first` segments at the mixture of what is owed, the rest nearest
    to the wish.
    """
    low, high = (np.asarray(bound, dtype=np.float64) for bound in (low, high))
    even = nearest_schedule(np.ones((1, len(owed))), [sizes.sum()], owed, low, high)[0]
    varies = np.ptp(wish[first:] / wish[first:].sum(1, keepdims=True), axis=0).max() > 1e-12
    if not varies:
        return np.tile(even, (len(sizes), 1)), ()
    asked = np.where(owed > 0, wish[first:], 1.0)
    rest = nearest_schedule(asked, sizes[first:], owed - even * sizes[:first].sum(), low, high)
    told = np.concatenate([np.tile(even, (first, 1)), rest])
    if np.abs(rest - even).max() > 1e-9:
        return told, ()
    return told, (NO_ROOM,)


def changes_of(at, weights):
    """(sample, weights f64[K]) wherever weights f64[M, K], from samples i64[M] on, differ from
    those before.
    """
    moved = [True, *(np.abs(b - a).max() > 1e-12 for a, b in itertools.pairwise(weights))]
    return tuple((int(sample), w) for sample, w, new in zip(at, weights, moved, strict=True) if new)
