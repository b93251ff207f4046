"""Gradients and Hessian-vector products of a scalar loss, by differences of gradients or by double
backward.

A loss is a callable that takes the parameters as a list of tensors and returns a scalar; a vector v
is a list of tensors with the shapes of the parameters. Parameters are read, never written: every
evaluation happens on detached aliases or on displaced copies, so an exception leaves no trace in a
model. Nothing here communicates: under tensor or data parallelism the loss carries its own
collectives, the caller sums what is sharded, and squared lengths come from the caller's `square`:
vector -> float, equal on all ranks that share a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from megatron_commute.ops import check_shapes, displace, gram

Vector = Sequence[torch.Tensor]
Loss = Callable[[list[torch.Tensor]], torch.Tensor]
METHODS = ("difference", "exact")
# Length of the displacement eps v in float32. Rounding and truncation balance between 4e-4 (GPTs
# and Llamas at initialisation) and 1e-2 (trained ones) along gradients, and at ten times that along
# random directions.
_LENGTH = 1.5e-3
_FRACTION = (1e-6, 1e-3)  # of |params|: not lost in the spacing of float32, and small against the weights
DIFFERENCE_FACTOR = 3 * math.sqrt(1.25)  # squared: of the products at eps and 2 eps, over the error at eps
_DOUBLINGS = 8  # of a step that is tuned, either way


class Product(NamedTuple):
    """gradient g and product H v: lists of tensors. error: estimated |error of H v| (None: not
    estimated).

    step: the eps of the difference, None for the exact method. Micro-batches taken at one step add
    up exactly.
    """

    gradient: list[torch.Tensor]
    product: list[torch.Tensor]
    error: float | None
    step: float | None


def _square(vector: Vector) -> float:
    """Squared length of a vector that lies on this rank as a whole."""
    return sum(_inner(t, t) for t in vector)


def _inner(x: torch.Tensor, y: torch.Tensor) -> float:
    return gram([[x]], [[y]]).item()


def gradient(loss: Loss, params: Vector) -> list[torch.Tensor]:
    """Gradient of the loss at params, detached; zeros where the loss does not use a parameter.

    Raises ValueError without parameters, or when the loss uses none of them; FloatingPointError
    when it is not finite.
    """
    return finite(_slopes(loss, _leaves(params), twice=False), "the gradient")


def hessian_vector_product(
    loss: Loss, params: Vector, v: Vector, method: str = "difference", *, step: float | None = None
) -> list[torch.Tensor]:
    """H v at params, H the Hessian of the loss; methods and errors as in gradient_and_product."""
    return gradient_and_product(loss, params, v, method, step).product


def gradient_and_product(
    loss: Loss,
    params: Vector,
    v: Vector,
    method: str = "difference",
    step: float | None = None,
    *,
    check: bool = False,
    square: Callable[[Vector], float] = _square,
) -> Product:
    """Gradient g and Hessian-vector product H v of one batch.

    method difference: g = (g+ + g-)/2 and H v = (g+ - g-)/(2 eps) from the gradients g+- at
        params +- eps v, both with errors O(eps^2), at the cost of two gradients.
    method exact: double backward, which the model must allow (megatron models need the context
        manager of adapters.twice_differentiable). Attention kernels of torch take their MATH form;
        custom autograd functions are refused by name unless they are known.
    step: eps of the difference; None takes difference_step, or tuned_step with check.
    check: estimate the error of a difference too, for two more gradients at a given step, eight or
        more when the step is tuned.
    square: vector -> squared length; give one that sums over the ranks that share the model.

    Raises ValueError for an unknown method, v = 0, no parameters, shapes that differ,
    half-precision params, or a function that cannot be differentiated twice; FloatingPointError
    when a gradient is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    _leaves(params)
    check_shapes(params, v, "params and v")
    if method == "exact":
        _nonzero(square(v) if step is None else 1.0)
        return _exact(loss, params, v)
    if step is None and check:
        step, error = tuned_step(loss, params, v, square=square)
        return Product(*_central(loss, params, v, step), error, step)
    if step is None:
        step = difference_step(params, v, params_square=square(params), v_square=square(v))
    mean, product = _central(loss, params, v, step)
    error = None
    if check:
        error = difference_error(product, _central(loss, params, v, 2 * step)[1], square=square)
    return Product(mean, product, error, step)


def difference_step(
    params: Vector, v: Vector, *, params_square: float | None = None, v_square: float | None = None
) -> float:
    """The eps of a central difference, from |v| and |params| alone.

    eps |v| is a fixed length, 1.5e-3 in float32, kept between 1e-6 and 1e-3 of |params|. Rounding
    falls as 1/eps and truncation grows as eps^2, so the length follows the cube root of the
    precision of params. Along gradients of language models the product is then right to 1e-4 ..
    6e-4 in float32, in the worst cases seen to 1e-3; tuned_step finds the eps that is right to
    1e-4.

    params_square, v_square: squared lengths summed over the ranks that share the model; None: of
    the tensors. Raises ValueError when v is zero or not finite, or when params are half precision:
    give float32 copies.
    """
    _leaves(params)
    check_shapes(params, v, "params and v")
    length = math.sqrt(_nonzero(_square(v) if v_square is None else v_square))
    if not math.isfinite(length):
        raise ValueError("v is not finite: check the batch that its gradient was taken on")
    theta = math.sqrt(_square(params) if params_square is None else params_square)
    least = max(torch.finfo(p.dtype).eps for p in params)
    if least > torch.finfo(torch.float32).eps:
        raise ValueError("half-precision params swallow small displacements: give float32 copies of them")
    low, high = (f * theta for f in _FRACTION) if theta > 0 else (0.0, math.inf)
    return min(max(_LENGTH, low), high) * (least / torch.finfo(torch.float32).eps) ** (1 / 3) / length


def difference_error(
    product: Vector, at_double_step: Vector, *, square: Callable[[Vector], float] = _square
) -> float:
    """Estimated |error| of a central difference, from the same product at twice the step (each
    summed over its batch).

    Where truncation rules the two differ by 3 errors, where rounding rules by sqrt(1 + 1/4);
    dividing by the geometric mean of the two factors is right within 1.64 in both cases.
    """
    return math.sqrt(square(_minus(product, at_double_step)) / DIFFERENCE_FACTOR)


def tuned_step(
    loss: Loss,
    params: Vector,
    v: Vector,
    start: float | None = None,
    *,
    square: Callable[[Vector], float] = _square,
) -> tuple[float, float]:
    """The eps with about the least error on this batch, and the estimated |error of H v| there.

    Rounding makes products at eps and 2 eps differ less as eps grows, truncation makes them differ
    more: eps is doubled or halved until the difference is least. There two differences (eps to 2
    eps, 2 eps to 4 eps) give the truncation, which grows as eps^2, and the rounding, which falls as
    1/eps.

    start: first eps, within a factor of thirty of the best; difference_step by default. Costs 8
    gradients from a good start, two more per doubling, and about six vectors of memory. Raises as
    difference_step and gradient.
    """

    def at(scale):
        return _central(loss, params, v, scale * eps)[1]

    eps = start or difference_step(params, v, params_square=square(params), v_square=square(v))
    one, two, four = (at(scale) for scale in (1, 2, 4))
    near, far = square(_minus(one, two)), square(_minus(two, four))
    grow = far < near
    edge = four if grow else one
    del one, two, four
    for _ in range(_DOUBLINGS):
        if grow and far >= near:
            break
        following = at(8 if grow else 0.5)
        gap = square(_minus(edge, following))
        if not grow and gap >= near:
            break
        near, far, eps = (far, gap, 2 * eps) if grow else (gap, near, eps / 2)
        edge = following
    # near = 9 t + 5/4 r and far = 144 t + 5/16 r, with t and r the squared truncation and rounding
    # at eps
    t = max(0.0, (far - near / 4) / 141.75)
    r = max(0.0, (near - 9 * t) / 1.25)
    square_error, eps = min((t + r, eps), (16 * t + r / 4, 2 * eps))
    return eps, math.sqrt(square_error)


def _central(
    loss: Loss, params: Vector, v: Vector, eps: float
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    plus = gradient(loss, displace(params, v, eps))
    minus = gradient(loss, displace(params, v, -eps))
    mean = [(a + b) / 2 for a, b in zip(plus, minus, strict=True)]
    return mean, [a.sub_(b).div_(2 * eps) for a, b in zip(plus, minus, strict=True)]


def _exact(loss: Loss, params: Vector, v: Vector) -> Product:
    leaves = _leaves(params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slopes = _slopes(loss, leaves, twice=True)
    curved = [(g, u.to(g.dtype)) for g, u in zip(slopes, v, strict=True) if g.requires_grad]
    if curved:
        outputs, along = zip(*curved, strict=True)
        product = list(torch.autograd.grad(outputs, leaves, along, materialize_grads=True))
    else:
        product = [torch.zeros_like(p) for p in leaves]
    slopes = finite([g.detach() for g in slopes], "the gradient")
    return Product(slopes, finite(product, "the Hessian-vector product"), None, None)


def _leaves(params: Vector) -> list[torch.Tensor]:
    if len(params) == 0:
        raise ValueError("no trainable parameter: give at least one tensor to differentiate by")
    return [p.detach().requires_grad_(True) for p in params]


def _slopes(loss: Loss, leaves: list[torch.Tensor], twice: bool) -> list[torch.Tensor]:
    with torch.enable_grad():
        value = loss(leaves)
        if not value.requires_grad:
            raise ValueError("the loss depends on no parameter: it must use the tensors that it is given")
        if twice:
            _refuse_unknown(value)
        return list(torch.autograd.grad(value, leaves, create_graph=twice, materialize_grads=True))


def _refuse_unknown(value: torch.Tensor) -> None:
    """Raise ValueError naming the custom autograd functions in the graph whose backward may not be
    differentiable.

    A backward that works on raw data loses terms of the second derivative without a word. Python
    functions count as known when their class says `twice_differentiable = True`.
    """
    names = set()
    for node in _graph(value):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if not getattr(node._forward_cls, "twice_differentiable", False):
                names.add(node._forward_cls.__name__)
        elif "CppNode" in node.name():
            names.add(node.name())
    if names:
        raise ValueError(
            f"not known to be twice differentiable: {', '.join(sorted(names))}. Use method: difference, or "
            "set twice_differentiable = True on the class if its backward is all differentiable operations"
        )


def _graph(value: torch.Tensor) -> Iterator[torch.autograd.graph.Node]:
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(child for child, _ in node.next_functions)


def _nonzero(square: float) -> float:
    if square == 0.0:
        raise ValueError("v is zero: a product needs a direction (is the gradient of the target zero?)")
    return square


def finite(vector: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    """The vector itself; FloatingPointError naming its tensors that are not finite."""
    # a norm takes no memory of the tensor's size, isfinite() would
    norms = torch.stack([torch.linalg.vector_norm(t, 1) for t in vector])
    bad = norms.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{name} is not finite in tensors {bad[:8]}: check the batch and the weights"
        )
    return vector


def _minus(a: Vector, b: Vector) -> list[torch.Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]
