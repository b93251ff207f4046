"""From influences to schedules: the constants of law `flow` fitted to them, or free segments along
them. M segments or bins of a run, K domains, J losses.

A road is a pattern f64[M, K] by which the logarithm of every weight over its planned share moves at
strength 1; strength scales it, and budgets and bounds are met exactly.
"""

import dataclasses

import numpy as np

from megatron_commute.decide import flow
from megatron_commute.feasible import nearest_schedule

BINS = 100  # of the influences that are kept of a run
SEGMENTS = 20  # of a free schedule, after the kept ones: finer ones would fit noise
MEMORIES = np.linspace(0.0, 12.0, 49)  # tried for the profile
FIRST = 3.5  # strength at which every road is tried, law flow's own range
FURTHER, NEARER = 4.5, 1.75  # the better road is tried at one of these as well
CAUTION = 0.8  # part of the harm that is planned for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Road:
    """One way to move the weights, at strength 1 by at most one in the logarithm."""

    name: str
    # "flow" or "free"
    edges: np.ndarray
    # parts of the run f64[M + 1], from 0 to 1, between which the pattern holds
    pattern: np.ndarray
    # f64[M, K]; 0 in the segments that are kept
    memory: float | None
    # of law flow's profile; None for free segments
    ranges: np.ndarray | None
    # f64[K] of law flow, the greatest of them 1
    explained: float
    # part of the centred influences' variance that the pattern has


def edges_of(steps, kept, count):
    """Steps i64[M + 1] at which segments begin: the kept ones, then `count` of about one length."""
    count = min(count, steps - kept)
    inner = kept + np.arange(count + 1) * (steps - kept) // count
    return np.concatenate([[0], inner]) if kept else inner


def binned(values, steps):
    """Means f64[J, M, K] of influences f64[J, T, K] in at most BINS parts of about one length."""
    edges = np.arange(min(BINS, steps) + 1) * steps // min(BINS, steps)
    return np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)[:, None]


def of_target(values, target):
    """Influences f64[B, K] on the target f64[K] over the trained domains, from those on every loss
    f64[J, B, K], in which the trained domains stand first.
    """
    return np.tensordot(np.asarray(target), np.asarray(values)[: len(target)], 1)


def centred(values, weights, sizes, rounds=50):
    """Influences f64[M, K] less what row sums and budgets make irrelevant, under weights f64[M, K]
    of segments that take sizes f64[M] samples: what is left is mu_k + nu_m away from an optimum.
    """
    found, share = np.array(values, dtype=np.float64), weights * np.asarray(sizes)[:, None]
    for _ in range(rounds):
        found -= (found * share).sum(1, keepdims=True) / share.sum(1, keepdims=True)
        found -= (found * share).sum(0) / np.maximum(share.sum(0), np.finfo(float).tiny)
    return found


def wish(values, shares, steps, edges, kept):
    """By how much a sample of each domain helps above the average f64[M, K], at the constant
    mixture, in segments between steps `edges`; 0 in the kept one. values f64[B, K]: influences in
    bins.
    """
    at = (np.arange(steps) * len(values)) // steps
    means = np.add.reduceat(values[at], edges[:-1]) / np.diff(edges)[:, None]
    first, found = int(kept > 0), np.zeros_like(means)
    even = np.tile(shares, (len(means) - first, 1))
    found[first:] = -centred(means[first:], even, np.diff(edges)[first:])
    return found


def of_flow(values, shares, rates, kept):
    """The road of law flow that explains the influences f64[B, K] of the target best.

    rates f64[T]: learning rates of the run; kept: its first steps, which stay at the mixture.
    """
    steps, best = len(rates), None
    edges = edges_of(steps, kept, flow.SEGMENTS - 1)
    helped, first = wish(values, shares, steps, edges, kept), int(kept > 0)
    total = float((helped**2 * shares).sum())
    for memory in MEMORIES:
        profile = flow.profile(rates, memory, flow.scale_of(rates, memory, kept))
        p = np.add.reduceat(profile, edges[:-1]) / np.diff(edges)
        moved = p[first:] - p[first:].mean()
        if not moved @ moved > 0:
            continue  # every step counts alike, so no order does
        ranges = moved @ helped[first:] / (moved @ moved)
        rest = helped[first:] - np.outer(moved, ranges)
        explained = 1 - float((rest**2 * shares).sum()) / total if total else 0.0
        if best is None or explained > best.explained:
            p[:first] = 0.0
            ranges = ranges / max(np.abs(ranges).max(), np.finfo(float).tiny)
            about = {"memory": float(memory), "ranges": ranges, "explained": explained}
            best = Road(name="flow", edges=edges / steps, pattern=np.outer(p, ranges), **about)
    return best


def free(values, shares, steps, kept):
    """The road along the influences f64[B, K] of the target themselves."""
    edges = edges_of(steps, kept, SEGMENTS)
    helped = wish(values, shares, steps, edges, kept)
    largest = np.abs(helped).max()
    pattern = helped / largest if largest else helped
    return Road(name="free", edges=edges / steps, pattern=pattern, memory=None, ranges=None, explained=1.0)


def weights(road, strength, shares, low, high):
    """Weights f64[M, K] of a road at a strength: budgets, which are shares f64[K] of the samples,
    and bounds low, high f64[K] exact, the kept segment at the mixture.
    """
    sizes, first = np.diff(road.edges), int(not road.pattern[0].any())
    asked = shares * np.exp(strength * road.pattern[first:])
    owed = np.asarray(shares) * sizes[first:].sum()
    moved = nearest_schedule(np.maximum(asked, np.finfo(float).tiny), sizes[first:], owed, low, high)
    return np.concatenate([np.tile(shares, (first, 1)), moved])


def by_step(edges, values, steps):
    """Weights f64[T, K] of every step, of segments f64[M, K] between parts of a run f64[M + 1]."""
    at = np.searchsorted(np.asarray(edges)[1:-1], (np.arange(steps) + 0.5) / steps, side="right")
    return np.asarray(values)[at]


def by_sample(edges, values, samples, batch):
    """Changes [(sample, weights f64[K])] of a run, at whole batches."""
    at = np.round(np.asarray(edges)[:-1] * samples / batch).astype(np.int64) * batch
    return flow.changes_of(at, np.asarray(values))


def curve(tried, moved):
    """The polynomial through 0 and what the strengths tried, f64[n], changed, moved f64[n, L]:
    (strengths f64[S] from 0 to the greatest tried, changes f64[S, L]).
    """
    tried = np.asarray(tried, dtype=np.float64)
    powers = np.arange(1, len(tried) + 1)
    parts = np.linalg.solve(tried[:, None] ** powers, np.asarray(moved, dtype=np.float64))
    at = np.linspace(0.0, tried.max(), 51)
    return at, at[:, None] ** powers @ parts


def second_strength(of_target, of_domains, harm):
    """Where a road is tried next, from what FIRST changed: the target and, as parts of their
    losses f64[K], the domains.
    """
    room = FURTHER / FIRST * np.max(of_domains) <= CAUTION * harm  # harm grows about with the strength
    return FURTHER if of_target < 0 and room else NEARER


def strength_within(strengths, of_target, of_domains, harm):
    """The strength of a curve that helps the target most while no domain loses more than CAUTION x
    harm.

    of_target f64[S], of_domains f64[S, K]: changes, the latter as parts of the domains' losses.
    """
    allowed = np.all(of_domains <= CAUTION * harm, axis=1)
    allowed = np.logical_and.accumulate(allowed)  # a strength beyond one that harms is not trusted
    best = int(np.argmin(np.where(allowed, of_target, np.inf)))
    return float(strengths[best]), float(of_target[best])


def marginal(values, shares, steps):
    """What one percent more samples of each domain, less of all others, does to a loss f64[K], in
    nats, from its influences f64[B, K] in a run of `steps`.
    """
    mean = steps * np.asarray(values).mean(0)
    return 0.01 * np.asarray(shares) * (mean - mean @ shares)
