"""What a series of probes recommends for a repetition of the run, what that would change, and what such words are worth.

Pure functions of the lines of a record.
"""

import types

import numpy as np

from megatron_commute import bracket, calibration, control, controller, schedule

LAW = "tilt"
LOCAL = (
    "the criterion is local: it weighs one window against the next by the gradient of that moment. On language models most "
    "of such an effect is recency, which the training after it wipes out; over long horizons local decisions can harm. "
    "Take the schedule as a hypothesis for a paired run, not as a gain"
)


def improvable(line, plan, splits, confidence):
    """Corollary 3.2(b) at a probe line, by target: [[[earlier, later], ...], ...] names of the pairs whose order the
    measurement says to change, beyond its error; empty lists where the weights pass as locally optimal.
    """
    score, gap_se = (np.array(line[key], dtype=np.float64) for key in ("score", "gap_se"))
    score, gap_se = np.atleast_2d(score), gap_se.reshape(-1, *gap_se.shape[-2:])
    error = calibration.student(splits - 1, confidence) * np.where(np.isfinite(gap_se), gap_se, np.inf)
    found = [
        bracket.improvable(s, np.array(line["weights"]), e, plan.minimum, plan.maximum)
        for s, e in zip(score, error, strict=True)
    ]
    return [[[plan.names[j], plan.names[i]] for i, j in np.argwhere(pairs)] for pairs in found]


def recommend(config, plan, run, fresh, probes):
    """The weights that law `tilt` would have given a run like this one at each of its checkpoints, budgets kept: a dict with
    points [[sample, [K weights]]], served [K], expected and expected_se (nats), or `reason` where there is none.

    fresh: the run's Mixture at sample 0; probes: probe lines of one target, by sample. Before the first checkpoint the
    planned weights hold. Domains without budget get the samples that the plan gives them.
    """
    if len(plan.targets) > 1:
        return {"law": LAW, "reason": "target `each` is reported, no schedule serves several targets at once"}
    batch = run.global_batch
    within = [line for line in probes if 0 < line["sample"] < plan.samples]
    if not within:
        return {"law": LAW, "reason": "no checkpoint lies inside the run"}
    planned = _with_budgets(plan, fresh)
    stream, points = planned.copy(), []
    ends = [line["sample"] for line in within[1:]] + [plan.samples]
    for line, end in zip(within, ends, strict=True):
        stream.skip(line["sample"] - stream.index)
        found = types.SimpleNamespace(**{key: [np.array(line[key], float)] for key in ("score", "score_se")})
        left, progress = plan.samples - line["sample"], line["sample"] / plan.samples
        window = max(batch, end - line["sample"])
        budgets = [None if b is None else int(b) for b in planned.budgets]
        known = _Plan(plan, budgets)
        seen = control.situation(config, known, stream, left, window, found, progress)
        decision = controller.decide(LAW, seen)
        weights = stream.weights if decision.weights is None else decision.weights
        if decision.weights is not None:
            stream.schedule(weights, line["sample"])
        if not np.allclose(weights, points[-1][1] if points else planned.weights, atol=1e-9):
            points.append(
                [line["sample"], np.asarray(weights).tolist()]
            )  # a used-up budget moves weights too
    told = _effect(planned, points, within, plan, batch)
    return {"law": LAW, "points": [[0, np.asarray(planned.weights).tolist()], *points], **told}


class _Plan:
    """A Plan with other budgets."""

    def __init__(self, plan, budgets):
        self.plan, self.budgets = plan, budgets

    def __getattr__(self, name):
        return getattr(self.plan, name)


def _with_budgets(plan, fresh):
    """The run's own stream, with what it would serve of every domain as budgets where it has none."""
    from megatron_commute.mixture import Mixture

    if all(budget is not None for budget in plan.budgets):
        return fresh
    served = schedule.counts_along(fresh, [plan.samples])[-1]
    bounds = {"samples": plan.samples, "minimum": plan.minimum, "maximum": plan.maximum}
    stream = Mixture(plan.weights, [int(n) for n in served], **bounds)
    for at_sample, weights in plan.schedule:
        stream.schedule(weights, at_sample)
    return stream


def _effect(planned, points, probes, plan, batch):
    """Served samples of the recommended stream and the predicted change of the target loss against the planned one.

    With C_k the samples of domain k taken before their time, in steps, the change is the integral over steps of
    C . score r^2, r the learning rate; transfers between pairs of domains bring each its own bracket.gap error, added up
    within a checkpoint as if they were one error, and in quadrature over checkpoints.
    """
    stream = planned.copy()
    for at, weights in points:
        stream.schedule(weights, at)
    knots = sorted({0, *(line["sample"] for line in probes), plan.samples})
    ahead = (schedule.counts_along(stream, knots) - schedule.counts_along(planned, knots)) / batch
    expected, variance = 0.0, 0.0
    for line in probes:
        m = knots.index(line["sample"])
        steps = (knots[m + 1] - knots[m]) / batch
        area = (ahead[m] + ahead[m + 1]) / 2 * steps
        rate = bracket.window_time(*line["windows"]) / line["window_steps"]
        expected += bracket.predicted_excess_loss(float(area @ np.array(line["score"])), 1.0, rate)
        error = float((_transfers(area) * np.array(line["gap_se"], dtype=np.float64)).sum())
        variance += bracket.predicted_excess_loss(error, 1.0, rate) ** 2
    served = schedule.counts_along(stream, [plan.samples])[-1]
    return {"expected": expected, "expected_se": float(np.sqrt(variance)), "served": served.tolist()}


def _transfers(area):
    """[K, K]: what each domain with more gets from each with less, in proportion; area f64[K] sums to zero."""
    more, less = np.maximum(area, 0.0), np.maximum(-area, 0.0)
    total = max(more.sum(), 1e-300)
    return np.outer(more, less) / total


def worth(lines, names):
    """One statement on how well predictions of this kind have held, from the lines of the run's own record ([] without one).

    names: (metric, direction) of the probes.
    """
    signal = calibration.signal_of(LAW, names)
    judgements = [line for line in lines if line["event"] == "calibration" and line.get("signals")]
    book = calibration.book_of(judgements)
    found = calibration.judged(book[signal]) if signal in book else None
    if found is None or not found.n:
        return (
            "How well such predictions hold here is not known: the run's record has no measured order effects beyond their "
            f"error to judge {signal} by (response.kind: lock-in or rollout measures them). And {LOCAL}."
        )
    told = f"In this run {signal} foretold the sign of {found.hits} of {found.n} measured order effects"
    told += f" ({found.low:.0%} to {found.high:.0%})"
    if found.scale is not None:
        told += f", their size off by a factor of {found.scale:.2g}"
    constant = calibration.judged(book[calibration.LAST]) if calibration.LAST in book else None
    if constant is not None and constant.n:
        told += f"; the constant `{calibration.LAST}` that of {constant.hits} of {constant.n}"
    verdict = "it has earned trust" if found.trusted else "that is no better than chance, beyond doubt"
    return f"{told}: {verdict}. Still, {LOCAL}."
