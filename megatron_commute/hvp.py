"""Gradients and Hessian-vector products of a scalar loss, by differences of gradients or by double backward.

A loss is a callable that takes the parameters as a list of tensors and returns a scalar; a vector v is a list of tensors
with the shapes of the parameters. Parameters are read, never written: every evaluation happens on detached aliases or on
displaced copies, so an exception leaves no trace in a model. Nothing here communicates: under tensor or data parallelism
the loss carries its own collectives and the caller sums what is sharded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megatron_commute.ops import check_shapes, displace, gram

Loss = Callable[[list[torch.Tensor]], torch.Tensor]
METHODS = ("difference", "exact")
_RELATIVE_STEP = 2.5e-5  # |eps v| / |theta| in float32
_PRECISIONS = (torch.float32, torch.float64)


class Product(NamedTuple):
    """gradient g and product H v: lists of tensors. error: estimated |error of the product|, None where not estimated.

    step: the eps of the difference, None for the exact method. Sums over micro-batches taken at one step add exactly.
    """

    gradient: list[torch.Tensor]
    product: list[torch.Tensor]
    error: float | None
    step: float | None


def gradient(loss: Loss, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gradient of the loss at params, detached; zeros where the loss does not use a parameter.

    Raises ValueError without parameters, or when the loss uses none of them; FloatingPointError when it is not finite.
    """
    leaves = _leaves(params)
    return _finite([g.detach() for g in _backward(loss, leaves, create_graph=False)], "the gradient")


def hessian_vector_product(
    loss: Loss,
    params: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    method: str = "difference",
    *,
    step: float | None = None,
) -> list[torch.Tensor]:
    """H v at params, H the Hessian of the loss; see gradient_and_product for the methods and the errors raised."""
    return gradient_and_product(loss, params, v, method, step).product


def gradient_and_product(
    loss: Loss,
    params: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    method: str = "difference",
    step: float | None = None,
    *,
    check: bool = False,
) -> Product:
    """Gradient and Hessian-vector product of one batch.

    method difference: g = (g+ + g-)/2 and H v = (g+ - g-)/(2 eps), where g+ and g- are gradients at params +- eps v: two
    gradients, errors O(eps^2). exact: double backward, which a model must allow (megatron models need the context manager
    of adapters.twice_differentiable). step: eps; None takes difference_step(params, v) from the tensors given, which under
    tensor parallelism are shards: compute it from global norms and pass it. check: estimate the error from a second
    difference at 2 eps (two more gradients).
    Raises ValueError for an unknown method, v = 0, no parameters, or shapes that differ; FloatingPointError when a
    gradient is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    check_shapes(params, v, "params and v")
    if method == "exact":
        return _exact(loss, params, v, checked=step is not None)
    eps = difference_step(params, v) if step is None else float(step)
    mean, product = _central(loss, params, v, eps)
    error = difference_error(product, _central(loss, params, v, 2 * eps)[1]) if check else None
    return Product(mean, product, error, eps)


def difference_step(
    params: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    *,
    params_square: float | None = None,
    v_square: float | None = None,
) -> float:
    """The eps of a central difference: |eps v| is a fixed small fraction of |params|, by their precision.

    params_square, v_square: squared norms already summed over the ranks that share the model; None takes the norms of the
    tensors given. Raises ValueError when v is zero or not finite, or params are half precision, which would swallow the
    displacement: give float32 copies.
    """
    _leaves(params)
    check_shapes(params, v, "params and v")
    length = math.sqrt(_square(v) if v_square is None else v_square)
    theta = math.sqrt(_square(params) if params_square is None else params_square)
    if length == 0.0:
        raise ValueError(
            "v is zero: a Hessian-vector product needs a direction (is the gradient of the target zero?)"
        )
    if not math.isfinite(length):
        raise ValueError("v is not finite: check the batch that its gradient was taken on")
    dtype = next((p.dtype for p in params if p.dtype not in _PRECISIONS), params[0].dtype)
    if dtype not in _PRECISIONS:
        raise ValueError(
            f"params are {dtype}, which swallows small displacements: give float32 copies of them"
        )
    # truncation grows as eps^2 and rounding as 1/eps, so the best step follows the cube root of the precision
    scale = (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) ** (1 / 3)
    return _RELATIVE_STEP * scale * (theta or 1.0) / length


def difference_error(product: Sequence[torch.Tensor], at_double_step: Sequence[torch.Tensor]) -> float:
    """Estimated |error| of a central difference from the same product at twice the step (both summed over a batch).

    Where truncation rules, the two differ by 3 errors; where rounding rules, by sqrt(1 + 1/4). Dividing by the geometric
    mean of the two factors is right within 1.64 in both cases.
    """
    gap = [a - b for a, b in zip(product, at_double_step, strict=True)]
    return math.sqrt(_square(gap)) / math.sqrt(3 * math.sqrt(1.25))


def _central(loss: Loss, params: Sequence[torch.Tensor], v: Sequence[torch.Tensor], eps: float):
    plus = gradient(loss, displace(params, v, eps))
    minus = gradient(loss, displace(params, v, -eps))
    mean = [(a + b) / 2 for a, b in zip(plus, minus, strict=True)]
    return mean, [a.sub_(b).div_(2 * eps) for a, b in zip(plus, minus, strict=True)]


def _exact(loss: Loss, params: Sequence[torch.Tensor], v: Sequence[torch.Tensor], checked: bool) -> Product:
    leaves = _leaves(params)
    if not checked and _square(v) == 0.0:
        raise ValueError(
            "v is zero: a Hessian-vector product needs a direction (is the gradient of the target zero?)"
        )
    slopes = _backward(loss, leaves, create_graph=True)
    if not any(g.requires_grad for g in slopes):
        raise ValueError("the gradient of the loss has no graph: the model cannot be differentiated twice")
    along = [(g, u.to(g.dtype)) for g, u in zip(slopes, v, strict=True) if g.requires_grad]
    product = torch.autograd.grad(
        [g for g, _ in along], leaves, [u for _, u in along], materialize_grads=True
    )
    _finite([g.detach() for g in slopes], "the gradient")
    return Product(
        [g.detach() for g in slopes], _finite(list(product), "the Hessian-vector product"), None, None
    )


def _leaves(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if len(params) == 0:
        raise ValueError("no trainable parameter: give at least one tensor to differentiate by")
    return [p.detach().requires_grad_(True) for p in params]


def _backward(loss: Loss, leaves: list[torch.Tensor], create_graph: bool) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        value = loss(leaves)
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter: it must use the tensors that it is given"
            )
        return torch.autograd.grad(value, leaves, create_graph=create_graph, materialize_grads=True)


def _finite(vector: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    bad = torch.stack([torch.isfinite(t).all() for t in vector]).logical_not().nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{name} is not finite in tensors {bad[:8]}: check the batch and the weights"
        )
    return vector


def _square(vector: Sequence[torch.Tensor]) -> float:
    return float(sum(gram([[t]], [[t]]).item() for t in vector))
