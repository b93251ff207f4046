"""Law `receding`: the first window of the best plan for the rest of the run, on a small quadratic
model.

No running job keeps such a model (receding.py), so the law has no name in a mixture file;
experiments hand it to controller.decide as a function, with functools.partial(receding, model=...,
loss=...).
"""

from typing import NamedTuple

import numpy as np

from megatron_commute.decide.laws import Wish, excess_first, shares_of
from megatron_commute.experiments import receding_plan

GATE = 5e-4  # of the loss: less than that, a predicted gain does not begin anything
MOST_PIECES = 32  # of a plan: windows of equal length while they are few, then growing
ROUNDS = 240, 20  # of descent: of the first plan, and of one that goes on from the last
# part of the disagreement with the leaner model that is an error, without and with noise
DISAGREEMENT = 0.25, 0.5
OPTIMISM = 0.25  # part of what the leaner model's plan loses in the fuller one that is an error
STEPS = (1.0, 0.7, 0.4, 0.2, 0.1)  # parts of the planned deviation that are weighed against each other
DRAWS = 4  # models as they would be measured again, where there is noise
AGAIN = 60, 8  # rounds of descent on each: of the first plan, and of one that goes on


class Proposal(NamedTuple):
    """wish f64[K] for the coming window, the shares where not active; expected, error: change of
    the target loss at the end against the shares, and its standard error; constant: its change
    under the shares from now on; plan f64[M, K], pace: for the next call.
    """

    wish: np.ndarray
    active: bool
    expected: float
    error: float
    constant: float
    plan: np.ndarray
    pace: np.ndarray


def receding(situation, model, loss):
    """Plans the rest of the run anew at every decision on `model` (a receding.Model, RH-Nys) and
    wishes the first window; no more of it than is surer than its error, and nothing that begins
    with less than GATE of the target loss at the end (`loss`: now, nats). No oracle: the model
    knows only products and gradients.
    """
    s, shares = situation, shares_of(situation)
    times, sizes = segments(s.samples_left, min(s.window, s.samples_left), model.clock)
    start = continued(s.memory, sizes, len(shares))
    found = propose(model, times, sizes, shares * s.samples_left, start)
    kept = {"plan": found.plan.round(9).tolist(), "sizes": sizes.tolist()}
    if not found.active:
        return Wish(shares, False, "no plan gains more than its error", kept)
    why = doubt(found, loss, s.confidence, s.memory.get("acting", False))
    if why is not None:
        return Wish(shares, False, why, kept)
    return Wish(
        found.wish,
        True,
        "the first window of the best plan for the rest of the run",
        {**kept, "acting": True},
    )


def doubt(found, loss, confidence, acting):
    """Why the gain that a Proposal predicts does not count, or None. acting: a plan is being
    carried out, so what is left to gain shrinks.
    """
    from scipy.special import ndtri

    expected, error = float(found.expected), float(found.error)
    if not np.isfinite([expected, error]).all() or -expected <= ndtri(0.5 + confidence / 2) * error:
        return f"the expected change {expected:+.2g} is inside its error"
    if not acting and -expected < GATE * abs(loss + float(found.constant)):
        return f"the expected gain {-expected:.2g} is below {GATE:g} of the loss"
    return None


def continued(memory, sizes, K):
    """The last decision's plan over segments of `sizes` f64[M] that end where it ends, f64[M, K];
    None without one.
    """
    plan, before = (np.array(memory.get(key, []), dtype=np.float64) for key in ("plan", "sizes"))
    if plan.ndim != 2 or plan.shape != (len(before), K) or before.sum() < sizes.sum():
        return None
    at = before.sum() - sizes.sum() + np.concatenate([[0.0], np.cumsum(sizes)])
    ends = np.concatenate([[0.0], np.cumsum(before)])
    spent = np.concatenate([np.zeros((1, K)), np.cumsum(plan * before[:, None], 0)])
    return np.diff(np.stack([np.interp(at, ends, column) for column in spent.T], 1), axis=0) / sizes[:, None]


def segments(samples_left, window, clock):
    """(times f64[M], sizes f64[M]) of the rest of a run: the coming window first, then equal or
    growing pieces.
    """
    count = -(-samples_left // window)
    if count <= MOST_PIECES:
        sizes = np.full(int(count), float(window))
        sizes[-1] = samples_left - sizes[:-1].sum()
    else:
        low, high = 1.0, 2.0
        for _ in range(60):  # the ratio at which MOST_PIECES growing pieces fill the run
            ratio = (low + high) / 2
            low, high = (
                (ratio, high)
                if window * (ratio**MOST_PIECES - 1) / (ratio - 1) < samples_left
                else (low, ratio)
            )
        sizes = window * ratio ** np.arange(MOST_PIECES)
        sizes *= samples_left / sizes.sum()
    ends = np.concatenate([[0.0], np.cumsum(sizes)]) / samples_left
    return np.diff(np.interp(ends, np.linspace(0, 1, len(clock)), clock)), sizes


def target_last(rest, sizes, target):
    """Schedule f64[M, K]: excess budgets first, then the target's mixture for as long as the
    budgets carry it.
    """
    first, excess = excess_first(rest, target)
    first = max(first, 1e-9 * sizes.sum())
    early = np.clip((first - (np.cumsum(sizes) - sizes)) / sizes, 0, 1)[:, None]
    return early * (excess / first) + (1 - early) * target


def gains(quadratic, times, base, plan):
    """(loss under base f64[M, K] - loss with the parts STEPS of what `plan` f64[..., M, K] deviates
    from it) f64[..., S].
    """
    tried = base + np.reshape(STEPS, (-1, 1, 1)) * (plan - base)[..., None, :, :]
    return receding_plan.loss_change(quadratic, base, times) - receding_plan.loss_change(
        quadratic, tried, times
    )


def propose(model, times, sizes, rest, start=None, pace=None):
    """The Proposal for the coming window: plan the rest of the run on the small model, apply no
    more of it than is sure.

    times f64[M], sizes f64[M] as from `segments`, rest f64[K] samples left of every domain (their
    sum is that of sizes); start f64[M, K], pace: the last plan for the windows that remain. The
    step is the part of a plan's deviation from the shares with the largest gain minus two errors.
    """
    shares = rest / rest.sum()
    base = np.tile(shares, (len(sizes), 1))
    begin, goes_on = base, start is not None
    if goes_on:
        begin = receding_plan.spread(np.maximum(0.98 * start + 0.02 * base, 1e-6), sizes, rest)
    run = times, sizes, rest
    if model.noisy:
        plan, claims = noisy_claims(model, run, base, begin, AGAIN[goes_on])
    else:
        plan, pace, claims = exact_claims(model, run, base, begin, ROUNDS[goes_on], pace)
    first, gain, error = (np.concatenate(column) for column in zip(*claims, strict=True))
    best = int(np.argmax(gain - 2 * error))
    active = bool(gain[best] > 2 * error[best])
    constant = float(receding_plan.loss_change(model.full, base, times))
    wish = first[best] if active else shares
    return Proposal(wish, active, -float(gain[best]), float(error[best]), constant, plan, pace)


def claim(plan, base, gain, *errors):
    """(first windows f64[S, K] of the STEPS from base towards plan, their gain f64[S], its error
    f64[S]).
    """
    first = base[0] + np.reshape(STEPS, (-1, 1)) * (plan[0] - base[0])
    return first, gain, np.sqrt(sum(error**2 for error in errors))


def exact_claims(model, run, base, begin, rounds, pace):
    """(plan f64[M, K], pace, its claim) of a model without noise.

    Errors: how far the leaner model disagrees about the plan, and what the leaner model's own best
    plan, chosen for its faults, loses when the fuller one judges it; a part of each counts, since
    the fuller one errs by less.
    """
    times, sizes, rest = run
    plan, _, pace = receding_plan.descend(model.full, begin, times, sizes, rest, rounds, pace)
    chosen, value, _ = receding_plan.descend(model.lean, begin, times, sizes, rest, rounds, pace)
    promised = receding_plan.loss_change(model.lean, base, times) - value
    bias = promised - gains(model.full, times, base, chosen)[0]
    gain = gains(model.full, times, base, plan)
    apart = gain - gains(model.lean, times, base, plan)
    return plan, pace, [claim(plan, base, gain, DISAGREEMENT[0] * apart, OPTIMISM * bias * np.array(STEPS))]


def noisy_claims(model, run, base, begin, rounds):
    """(plan f64[M, K], its claim and that of `target_last`) of a model that was measured with
    noise.

    A plan chosen freely on a noisy model is chosen for its noise, and harms. So the model is shrunk
    to what stands out of its noise; DRAWS models, as they would be measured and shrunk again if
    that were the truth, have a plan each, and what those keep of their gain in the truth tells what
    choosing is worth (parametric bootstrap). Their mean is the plan. The other is the target's own
    mixture at the end, which has nothing to choose: there the measurement counts as it is.
    """
    times, sizes, rest = run
    truth = receding_plan.shrunk(model.full, model.H_se, model.g_se)
    again = receding_plan.shrunk(model.draws(truth, DRAWS), model.H_se, model.g_se)
    found = receding_plan.descend(again, np.repeat(begin[None], DRAWS, 0), times, sizes, rest, rounds)[0]
    plan, kept = found.mean(0), gains(truth, times, base, found)
    apart = gains(truth, times, base, plan) - gains(model.lean, times, base, plan)
    chosen = claim(plan, base, kept.mean(0), kept.std(0, ddof=1), DISAGREEMENT[1] * apart)
    safe = target_last(rest, sizes, model.full.target)
    # no errors given: nothing is shrunk, only negative curvature is cut
    again = receding_plan.shrunk(model.draws(model.full, DRAWS), 0 * model.H_se, 0 * model.g_se)
    kept = receding_plan.loss_change(again, base, times) - receding_plan.loss_change(again, safe, times)
    gain = gains(model.full, times, base, safe)
    apart = gain - gains(model.lean, times, base, safe)
    errors = kept.std(ddof=1) * np.array(STEPS), DISAGREEMENT[1] * apart
    return plan, [chosen, claim(safe, base, gain, *errors)]
