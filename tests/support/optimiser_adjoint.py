"""The gradient at the end of a window of training, pulled back through the optimiser's own steps.

Exact for SGD (momentum), Adam and AdamW as torch.optim defines them: with s the optimiser's state
and theta', s' = step(theta, s, g(theta)), the row (lambda_theta, lambda_s) is multiplied by the
step's Jacobian from the right, in which the loss appears through one Hessian-vector product. A loss is
a callable params (list of tensors) -> scalar; vectors are such lists. Products are torch's own
double backward, so that nothing of the package judges itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Vector = Sequence[torch.Tensor]
Loss = Callable[[Vector], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One optimiser step. kind "sgd" (momentum, no dampening, no Nesterov) or "adam"; rate: learning rate.

    decay: weight decay, added to the gradient, or decoupled (AdamW) by the factor 1 - rate * decay.
    """

    kind: str
    rate: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    decoupled: bool = False


class Step(NamedTuple):
    """What was true just before one optimiser step: params, the step's loss, Rule and state, its number (from 1).

    state: () or (buffer,) for sgd, (m, v) for adam; each a list of tensors, zeros before the first step.
    """

    params: list[torch.Tensor]
    loss: Loss
    rule: Rule
    state: tuple[list[torch.Tensor], ...]
    number: int


def adjoint(target: Loss, end_params: Vector, window: Sequence[Step]) -> list[torch.Tensor]:
    """The target's gradient after `window`, pulled back to its start through every step: d target(end) / d params(start)."""
    pulled = _gradient(target, end_params)
    memory = tuple([torch.zeros_like(p) for p in pulled] for _ in window[-1].state)
    for step in reversed(window):
        pulled, memory = _back(step, pulled, memory)
    return pulled


def stored(optimizer: torch.optim.Optimizer, params: Vector, loss: Loss) -> Step:
    """The Step that `optimizer` (torch.optim SGD, Adam or AdamW, one group of parameters) is about to take; copies of all.

    Without Nesterov, dampening, AMSGrad and maximize.
    """
    kinds, name = {"SGD": "sgd", "Adam": "adam", "AdamW": "adam"}, type(optimizer).__name__
    (s,) = optimizer.param_groups
    names = ("momentum_buffer",) if kinds[name] == "sgd" else ("exp_avg", "exp_avg_sq")
    decoupled = name == "AdamW" or bool(s.get("decoupled_weight_decay"))
    rule = Rule(
        kinds[name], float(s["lr"]), s.get("momentum", 0.0), s.get("betas", (0.9, 0.999)), s.get("eps", 1e-8),
        s["weight_decay"], decoupled,
    )  # fmt: skip
    if kinds[name] == "sgd" and not rule.momentum:
        names = ()
    states = [optimizer.state.get(p, {}) for p in params]
    kept = tuple(
        [
            torch.zeros_like(p) if q.get(key) is None else q[key].clone()
            for p, q in zip(params, states, strict=True)
        ]
        for key in names
    )
    number = 1 + int(max((float(q.get("step", 0)) for q in states), default=0))
    return Step([p.detach().clone() for p in params], loss, rule, kept, number)


def _gradient(loss: Loss, params: Vector) -> list[torch.Tensor]:
    leaves = [p.detach().clone().requires_grad_(True) for p in params]
    return list(torch.autograd.grad(loss(leaves), leaves))


def _product(loss: Loss, params: Vector, v: Vector) -> list[torch.Tensor]:
    leaves = [p.detach().clone().requires_grad_(True) for p in params]
    slope = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    return list(torch.autograd.grad(slope, leaves, list(v)))


def _back(step: Step, pulled, memory):
    """(adjoint of params, of state) before the step from those after it; force: adjoint of the step's gradient."""
    rule = step.rule
    slope = _gradient(step.loss, step.params)
    if rule.decay and not rule.decoupled:
        slope = [g + rule.decay * p for g, p in zip(slope, step.params, strict=True)]
    back = _sgd if rule.kind == "sgd" else _adam
    force, memory = back(step, slope, pulled, memory)
    kept = 1 - rule.rate * rule.decay if rule.decoupled else 1.0
    own = rule.decay if not rule.decoupled else 0.0
    if not any(f.any() for f in force):
        return [kept * p for p in pulled], memory
    product = _product(step.loss, step.params, force)
    pulled = [kept * p + h + own * f for p, h, f in zip(pulled, product, force, strict=True)]
    return pulled, memory


def _sgd(step, slope, pulled, memory):
    """b' = momentum b + g, theta' = theta - rate b'."""
    force = [-step.rule.rate * p for p in pulled]
    if not memory:
        return force, ()
    force = [b + f for b, f in zip(memory[0], force, strict=True)]
    return force, ([step.rule.momentum * f for f in force],)


def _adam(step, slope, pulled, memory):
    """m' = b1 m + (1 - b1) g, v' = b2 v + (1 - b2) g^2, theta' = theta - rate (m'/c1) / (sqrt(v'/c2) + eps)."""
    rule, (b1, b2) = step.rule, step.rule.betas
    c1, c2 = 1 - b1**step.number, 1 - b2**step.number
    force, first, second = [], [], []
    for g, p, am, av, m, v in zip(slope, pulled, *memory, *step.state, strict=True):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        root = (v / c2).sqrt()
        bottom = root + rule.eps
        am = am - rule.rate * p / (c1 * bottom)
        moved = rule.rate * p * (m / c1) / (bottom * bottom) / (2 * c2 * root)
        av = av + torch.where(
            root > 0, moved, torch.zeros_like(moved)
        )  # a coordinate never used has no slope
        force.append((1 - b1) * am + 2 * (1 - b2) * g * av)
        first.append(b1 * am)
        second.append(b2 * av)
    return force, (first, second)
