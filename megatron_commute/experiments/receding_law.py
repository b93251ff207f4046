"""Law `receding`: the first window of the best plan for the rest of the run, on the small quadratic model of receding.py.

No running job keeps such a model, so the law has no name in a mixture file; experiments hand it to controller.decide as a
function, with functools.partial(receding, model=...).
"""

import numpy as np

from megatron_commute.experiments.receding import propose, segments
from megatron_commute.laws import Wish, shares_of


def receding(situation, model):
    """Plans the rest of the run anew at every decision on `model` (a receding.Model, RH-Nys) and wishes the first window;
    no more of it than is surer than its error. No oracle: the model knows only products and gradients."""
    s, shares = situation, shares_of(situation)
    times, sizes = segments(s.samples_left, min(s.window, s.samples_left), model.clock)
    start = continued(s.memory, sizes, len(shares))
    found = propose(model, times, sizes, shares * s.samples_left, start)
    kept = {"plan": found.plan.round(9).tolist(), "sizes": sizes.tolist()}
    if not found.active:
        return Wish(shares, False, "no plan gains more than its error", memory=kept)
    return Wish(
        found.wish,
        True,
        "the first window of the best plan for the rest of the run",
        expected=float(found.expected),
        expected_se=float(found.error),
        memory=kept,
        loss=None if s.loss is None else s.loss + float(found.constant),
    )


def continued(memory, sizes, K):
    """The last decision's plan over segments of `sizes` f64[M] that end where it ends, f64[M, K]; None without one."""
    plan, before = (np.array(memory.get(key, []), dtype=np.float64) for key in ("plan", "sizes"))
    if plan.ndim != 2 or plan.shape != (len(before), K) or before.sum() < sizes.sum():
        return None
    at = before.sum() - sizes.sum() + np.concatenate([[0.0], np.cumsum(sizes)])
    ends = np.concatenate([[0.0], np.cumsum(before)])
    spent = np.concatenate([np.zeros((1, K)), np.cumsum(plan * before[:, None], 0)])
    return np.diff(np.stack([np.interp(at, ends, column) for column in spent.T], 1), axis=0) / sizes[:, None]
