"""Law `flow` in mode act: what a decision sees of a run's plan, and what it says that it expects.
Pure functions. K domains, M segments of what is left.
"""

import dataclasses

import numpy as np

from megatron_commute.decide import flow

POINTS = 12  # at most, of what a decision says it expects of the rest of the run


def known(found, plan, ahead, at: int, end: int, batches) -> dict:
    """What law flow adds to a Situation at sample `at`, whose window ends at sample `end`, both on
    a global batch. found: flow_run.FlowRun; ahead: the mixture there; batches: of the run.
    """
    steps = len(found.rates)
    edges = flow.segment_edges(steps, found.kept)
    sizes = batches.of_steps(steps)
    whole = np.add.reduceat(found.schedule.profile * sizes, edges[:-1]) / np.add.reduceat(sizes, edges[:-1])
    begin, until = batches.step(at), min(batches.step(end), steps)
    cuts = np.unique(np.concatenate([[begin, until], edges[edges > begin]]))
    segment = np.searchsorted(edges, cuts[:-1], side="right") - 1
    return {
        "owed": owed(plan, ahead),
        "shares": plan.shares,
        "segments": np.diff(batches.begin(cuts)).astype(np.float64),
        # rates beyond those of the planned run count as its extremes
        "profile": np.clip(whole[segment], 0.0, 1.0),
        "kept": int((cuts[:-1] < found.kept).sum()),
    }


def owed(plan, ahead) -> np.ndarray:
    """Samples f64[K] that every domain is still to get from where the mixture `ahead` stands.

    By its weights so far and not by whole samples served: so the weights of an unchanged run come
    out again.
    """
    left = plan.samples - ahead.index
    endless = np.array([budget is None for budget in plan.budgets])
    due = np.maximum(plan.shares * plan.samples - ahead.target, 0.0)
    spare = max(left - due[~endless].sum(), 0.0)
    if due[endless].any():
        due[endless] *= spare / due[endless].sum()
    elif endless.any() and spare > 0:
        due[endless] = spare / endless.sum()
    return due * (left / due.sum())


def expected(found, seen, decision, at: int, batches) -> dict:
    """What a decision line says: the constants, the weights of the window as they were granted, and
    the course of the rest as law flow sees it. seen: the Situation.
    """
    told = {
        "memory": found.memory,
        "scale": dataclasses.asdict(found.schedule.scale),
        "target": seen.target,
        "strength": seen.strength,
        "ranges": flow.ranges(seen.target, seen.shares, seen.strength),
        "flow_left": float(found.rates[batches.step(at) :].sum()),
    }
    if decision.pieces is not None:
        changes = granted(seen, decision, at)
        told["pieces"] = {"sample": [s for s, _ in changes], "weights": [w for _, w in changes]}
    if decision.course is not None:
        starts = at + np.cumsum(seen.segments) - seen.segments
        some = np.unique(np.linspace(0, len(starts) - 1, min(len(starts), POINTS)).round().astype(int))
        told["expected"] = {
            "sample": starts[some],
            "weights": decision.course[some],
            "profile": seen.profile[some],
        }
    return told


def granted(seen, decision, at: int):
    """(sample, weights f64[K]) of a decision on the segments of its window, from sample `at` on."""
    sizes = seen.segments[: len(decision.pieces)]
    return flow.changes_of((at + np.cumsum(sizes) - sizes).astype(int), decision.pieces)
