"""What one more unit of weight on a domain, at every step of a recorded run, does to its final
losses: exact, through the optimiser's own steps.

With theta' = AdamW(theta) of the weighted gradient r and cotangents of what follows, the cotangent
G of the clipped gradient is pulled back through r (G_r), and I_k(t) = g_k . G_r. J losses, T steps,
K domains, P parameters.
"""

import dataclasses
import math

import numpy as np
import torch

from megatron_commute.design.proxy import CLIP_EPSILON

STEP = 1e-3  # length of the central difference of gradients, in a model of single precision
FINE_STEP = 1e-5  # in one of double precision
DEAD = 10.0  # times eps: a parameter whose gradient is only rounding has no influence
CHAOTIC = 4.0  # times its end length: where a cotangent grows to that, its past cannot be foretold
EARLY = 0.1  # part of a run that is not differentiated: training is chaotic there
NEXT = 0.05  # part of the run that stands for what comes before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Influences:
    """Of one recorded run."""

    names: tuple
    # of the J losses
    values: np.ndarray
    # f64[J, T, K]: d final loss / d weight
    reached: int
    # first step that was differentiated; before it stand the means that follow
    losses: np.ndarray
    # f64[J]: final, of the recorded run


def vectors_held(steps, losses, recompute):
    """Vectors of model size that a sweep holds at its peak, gradients and products included."""
    tape = 4 * (_segment(steps) if recompute else steps)
    snapshots = 3 * math.ceil(steps / _segment(steps)) if recompute else 0
    return tape + snapshots + 3 * losses + 12


def _segment(steps):
    return math.ceil(math.sqrt(steps))


def influences(run, weights, held, *, recompute=False, method="difference", early=EARLY, limit=CHAOTIC):
    """Influences of a run under weights f64[T, K].

    held: {name: i64[n, t + 1]} whose mean losses are differentiated. recompute: keep a state every
    sqrt(T) steps only and run each stretch twice. method: "difference" of gradients, or "exact".
    early, limit: where the sweep ends before the first step.
    """
    steps, K = run.proxy.steps, len(run.proxy.shares)
    stride = _segment(steps) if recompute else steps
    starts, state, tape = [], run.start(), None
    for begin in range(0, steps, stride):
        starts.append(state.copy())
        last = begin + stride >= steps
        tape = [] if last else None
        run.advance(state, weights, begin, min(begin + stride, steps), tape)
    held = {name: tokens.to(run.model.device) for name, tokens in held.items()}
    ends = [run.model.mean_gradient(state.theta, tokens) for tokens in held.values()]
    losses = np.array([run.model.mean_loss(state.theta, tokens) for tokens in held.values()])
    pulled = [[end.clone(), torch.zeros_like(end), torch.zeros_like(end)] for end in ends]
    found, reached = np.zeros((len(held), steps, K)), steps
    floor = int(early * steps)
    for begin in reversed(range(0, steps, stride)):
        if tape is None:
            tape = []
            run.advance(starts[begin // stride].copy(), weights, begin, min(begin + stride, steps), tape)
        while tape and reached > floor:
            reached = begin + len(tape) - 1
            found[:, reached] = _back(run, reached, weights[reached], tape.pop(), pulled, method)
            grown = [float(p[0].norm()) > limit * float(e.norm()) for p, e in zip(pulled, ends, strict=True)]
            if any(grown):
                floor = steps
        tape = None
        if reached <= floor:
            break
    values = _filled(found, reached)
    return Influences(names=tuple(held), values=values, reached=reached, losses=losses)


def _back(run, step, weights, kept, pulled, method):
    """Pull the cotangents of every loss back through one step, in place; f64[J, K]: g_k . G_r."""
    recipe, (b1, b2), model = run.proxy.recipe, run.proxy.recipe.betas, run.model
    theta, first, second, gradient = kept
    rate, c1, c2 = recipe.rates[step], 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    root = (second / c2).sqrt_()
    bottom = root + recipe.eps
    dead = root < DEAD * recipe.eps
    # few vectors of model size are made: beside a small model's gradients each of them counts
    by_second = torch.mul(bottom, bottom).mul_(root).reciprocal_().mul_(first)
    by_second.mul_(rate / (2 * c1 * c2)).masked_fill_(dead, 0)
    by_first = bottom.reciprocal_().mul_(-rate / c1).masked_fill_(dead, 0)
    decay = (-rate * recipe.weight_decay * model.decayed).add_(1)
    factor, norm = run.clipping(gradient)
    tokens, scale = run.weighted_batch(step, weights)
    result = np.zeros((len(pulled), len(weights)))
    for j, (at, of_first, of_second) in enumerate(pulled):
        of_first.addcmul_(at, by_first)
        of_second.addcmul_(at, by_second)
        force = (1 - b1) * of_first
        force.addcmul_(gradient, of_second, value=2 * (1 - b2) * factor)
        of_first.mul_(b1)
        of_second.mul_(b2)
        at.mul_(decay)
        if factor < 1:
            along = float(gradient @ force) / (norm * (norm + CLIP_EPSILON))
            force.sub_(gradient, alpha=along).mul_(factor)
        product, slopes = _product(model, theta, tokens, scale, force, method)
        at.add_(product)
        result[j] = slopes.double().view(len(weights), -1).mean(1).cpu().numpy()
    return result


def _product(model, theta, tokens, scale, force, method):
    """(Hessian times force [P], slope of every sequence's loss along it [b])."""
    if method == "exact":
        return model.product(theta, tokens, scale, force)
    length = float(force.norm())
    if length == 0:
        return torch.zeros_like(force), torch.zeros(len(tokens), dtype=model.dtype)
    h = (STEP if model.dtype == torch.float32 else FINE_STEP) / length
    above, more = model.gradient(theta, tokens, scale, force, h)
    below, less = model.gradient(theta, tokens, scale, force, -h)
    return above.sub_(below).div_(2 * h), (more.double() - less.double()) / (2 * h)


def _filled(found, reached):
    """Influences of the steps before `reached`: the mean of those that follow, kept within what
    the rest of the run shows.
    """
    steps = found.shape[1]
    if reached == 0:
        return found
    few, far = max(1, int(NEXT * steps)), min(steps - 1, reached + max(1, int(EARLY * steps)))
    kernel, later = np.ones(min(few, steps - far)), found[:, far:]
    smooth = np.apply_along_axis(lambda own: np.convolve(own, kernel, "valid"), 1, later) / len(kernel)
    most = np.abs(smooth).max(1)
    found[:, :far] = np.clip(found[:, :far], -CHAOTIC * most[:, None], CHAOTIC * most[:, None])
    found[:, :reached] = np.clip(found[:, reached : reached + few].mean(1), -most, most)[:, None]
    return found
