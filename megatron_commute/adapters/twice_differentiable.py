"""Megatron models that can be differentiated twice, for the exact Hessian-vector product.

Stock Megatron is silently wrong there: its cross-entropy treats the saved softmax as a constant,
and its tensor-parallel backward passes call raw all-reduces that autograd takes for the identity.
Inside `twice_differentiable` the functions below stand in for them. Each computes what the stock
function computes, forward and backward, operation by operation (so the gradient keeps its bits),
but every backward consists of operations that autograd can follow. Serves megatron-core and the
older core inside Megatron-DeepSpeed: both are imported as `megatron.core`.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator

import torch

from megatron_commute import hvp, reduce


class Copy(torch.autograd.Function):
    """Identity forward, sum over the tensor-parallel ranks backward: the adjoint of Reduce."""

    twice_differentiable = True

    @staticmethod
    def forward(ctx, x, group=None):
        ctx.group = _tensor_parallel(group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return Reduce.apply(slope, ctx.group), None


class Reduce(torch.autograd.Function):
    """Sum over the tensor-parallel ranks forward, identity backward: the adjoint of Copy."""

    twice_differentiable = True

    @staticmethod
    def forward(ctx, x, group=None):
        ctx.group = _tensor_parallel(group)
        return reduce.all_reduce_sum(x, ctx.group)

    @staticmethod
    def backward(ctx, slope):
        return Copy.apply(slope, ctx.group), None


class Linear(torch.autograd.Function):
    """x W' + bias; the gradient of x is summed over the tensor-parallel ranks where `sum_slope`
    says so.

    Takes the arguments of Megatron's LinearWithGradAccumulationAndAsyncCommunication, whose last is
    the tensor-parallel group in megatron-core and absent in Megatron-DeepSpeed.
    """

    twice_differentiable = True

    @staticmethod
    def forward(ctx, x, weight, bias, fused_accumulation, sum_slope, sequence_parallel, *rest):
        if fused_accumulation or sequence_parallel:
            fault = "gradient_accumulation_fusion" if fused_accumulation else "sequence_parallel"
            raise ValueError(f"{fault} cannot be differentiated twice: use method: difference")
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.arguments = bias is not None, 6 + len(rest)
        ctx.group = _tensor_parallel(rest[-1] if rest else None) if sum_slope else None
        out = torch.matmul(x, weight.t())
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, slope):
        x, weight = ctx.saved_tensors
        x_slope = slope.matmul(weight)
        if ctx.group is not None:
            # x is whole on every rank but used for this rank's columns: what flows back into it is
            # a share of a sum
            x, x_slope = Copy.apply(x, ctx.group), Reduce.apply(x_slope, ctx.group)
        rows, inputs = slope.reshape(-1, slope.shape[-1]), x.reshape(-1, x.shape[-1])
        bias_slope = rows.sum(dim=0) if ctx.has_bias else None
        return x_slope, rows.t().matmul(inputs), bias_slope, *[None] * (ctx.arguments - 3)


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits [..., vocabulary / ranks] split over the tensor-parallel ranks;
    targets int64 [...].

    The logits are kept instead of the softmax, so that the backward pass depends on them. Half
    precision is computed in float32, as megatron-core does; float64 stays.
    """

    twice_differentiable = True

    @staticmethod
    def forward(ctx, logits, target, label_smoothing=0.0):
        if label_smoothing:
            raise ValueError("label smoothing has no twice differentiable form here: use method: difference")
        ctx.save_for_backward(logits, target)
        shifted, place, absent = _shifted(logits, target)
        predicted = shifted.gather(-1, place[..., None])[..., 0].masked_fill(absent, 0.0)
        group = _tensor_parallel()
        total = reduce.all_reduce_sum(shifted.exp().sum(dim=-1), group)
        return total.log() - reduce.all_reduce_sum(predicted, group)

    @staticmethod
    def backward(ctx, slope):
        logits, target = ctx.saved_tensors
        group = _tensor_parallel()
        shifted, place, absent = _shifted(logits, target)
        powers = shifted.exp()
        # the total and the slope are whole on every rank but used for this rank's part of the
        # vocabulary, hence Copy
        total = Copy.apply(Reduce.apply(powers.sum(dim=-1), group), group)
        slope = Copy.apply(slope, group)
        softmax = powers / total[..., None]
        here = absent.logical_not().to(softmax.dtype)
        logit_slope = softmax.scatter_add(-1, place[..., None], -here[..., None]) * slope[..., None]
        return logit_slope.to(logits.dtype), None, None


def _shifted(logits, target):
    """Logits minus their maximum over the vocabulary; where each target lies on this rank, and
    whether it does not.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    group = _tensor_parallel()
    top = reduce.all_reduce_max(logits.detach().max(dim=-1).values, group)
    first = reduce.rank_in(group) * logits.shape[-1]
    absent = (target < first) | (target >= first + logits.shape[-1])
    return logits - top[..., None], (target - first).masked_fill(absent, 0), absent


class Viewless:
    """Stands for megatron's MakeViewlessTensor, which only hides that a tensor is a view."""

    @staticmethod
    def apply(x, requires_grad):
        return x


def _gelu(x, bias):
    return torch.nn.functional.gelu(x + bias, approximate="tanh")


def _geglu(x, bias=None, *_):
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * value


def _swiglu(x, bias=None, *_):
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * value


_CORE = "megatron.core."
_FUNCTIONS = {
    (_CORE + "tensor_parallel.mappings", "_CopyToModelParallelRegion"): Copy,
    (_CORE + "tensor_parallel.mappings", "_ReduceFromModelParallelRegion"): Reduce,
    (_CORE + "tensor_parallel.layers", "LinearWithGradAccumulationAndAsyncCommunication"): Linear,
    (_CORE + "tensor_parallel.cross_entropy", "_VocabParallelCrossEntropy"): CrossEntropy,
    (_CORE + "utils", "MakeViewlessTensor"): Viewless,
}
# fused activations are functions of their own (GELU in its tanh form even where the unfused one is
# not), so they are replaced by name where the layers look them up, not turned off
_FUSED = {
    (_CORE + "transformer.mlp", "bias_gelu_impl"): _gelu,
    (_CORE + "transformer.mlp", "bias_geglu_impl"): _geglu,
    (_CORE + "transformer.mlp", "bias_swiglu_impl"): _swiglu,
    ("megatron.model.transformer", "bias_gelu_impl"): _gelu,
}
# attributes of modules or their configs that select a path without second derivatives, and the
# value that avoids it
_SWITCHES = {
    "bias_dropout_fusion": False,
    "scaled_masked_softmax_fusion": False,
    "cross_entropy_loss_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "checkpoint_activations": False,
    "checkpoint_core_attention": False,
    "recompute_granularity": None,
    "recompute_input_layernorm": False,
    "recompute_pre_mlp_layernorm": False,
    "recompute_mlp": False,
    "recompute_up_proj": False,
}
_REFUSED = {
    "sequence_parallel": "sequence parallelism",
    "fp8": "FP8 arithmetic",
    "fp4": "FP4 arithmetic",
    "num_moe_experts": "a mixture of experts",
    "enable_cuda_graph": "a CUDA graph",
    "external_cuda_graph": "a CUDA graph",
}
_REFUSED_SIZES = {
    "pipeline_model_parallel_size": "pipeline stages",
    "context_parallel_size": "context parallelism",
}


@contextlib.contextmanager
def twice_differentiable(model: torch.nn.Module) -> Iterator[list[str]]:
    """Within the context, losses of a Megatron model are twice differentiable; everything is put
    back on leaving.

    Only the forward pass needs it: a graph built inside can be differentiated outside. Yields the
    names of what was turned off or replaced by another arithmetic (empty: the gradient keeps every
    bit of the stock one). Raises ValueError naming what the model uses and cannot be differentiated
    twice, or what this version of Megatron lacks. What is not known here is refused by name when
    hvp's exact method walks the graph.
    """
    refuse(model)
    stack = contextlib.ExitStack()
    with stack:
        for (module, name), stand_in in _FUNCTIONS.items():
            if not hasattr(sys.modules.get(module), name):
                raise ValueError(f"this version of Megatron has no {module}.{name}: use method: difference")
            _swap(stack, sys.modules[module], name, stand_in)
        for (module, name), stand_in in _FUSED.items():
            if hasattr(sys.modules.get(module), name):
                _swap(stack, sys.modules[module], name, stand_in)
        changed = {
            n
            for n in ("bias_activation_fusion", "bias_gelu_fusion")
            if any(_reads(o, n) for o in _holders(model))
        }
        for holder in _holders(model):
            for name, off in _SWITCHES.items():
                if _reads(holder, name):
                    changed.add(name)
                    _swap(stack, holder, name, off)
        yield sorted(changed)


def refuse(model: torch.nn.Module) -> None:
    """Raise ValueError naming the parts of a Megatron model that have no second derivative."""
    found = {type(m).__name__ for m in model.modules() if "transformer_engine" in type(m).__module__}
    for holder in _holders(model):
        found |= {text for name, text in _REFUSED.items() if _reads(holder, name)}
        found |= {text for name, text in _REFUSED_SIZES.items() if (_reads(holder, name) or 1) > 1}
    if found:
        raise ValueError(f"{', '.join(sorted(found))}: no second derivative; use method: difference")


def verify(
    model: torch.nn.Module,
    loss: hvp.Loss,
    params: hvp.Vector,
    square: Callable[[hvp.Vector], float],
    seed: int = 0,
) -> None:
    """Check the exact method on one batch before it is trusted; raise ArithmeticError where it is
    wrong.

    The gradient inside the context must equal the stock gradient bit by bit (on devices where two
    stock gradients differ, about as closely as those; to 1e-3 when something was turned off). The
    product along the gradient plus an equally long random vector must agree with a tuned difference
    of stock gradients within three times the estimated error of that. square: squared length over
    the ranks that share the model. Costs some 16 gradients and a dozen vectors of memory.
    """
    if any(getattr(sys.modules.get(module), name, None) is new for (module, name), new in _FUNCTIONS.items()):
        raise RuntimeError("verify compares with the stock functions: call it outside twice_differentiable")
    stock = hvp.gradient(loss, params)
    size, noise = square(stock), square(_minus(stock, hvp.gradient(loss, params)))
    with twice_differentiable(model) as changed:
        gap = square(_minus(stock, hvp.gradient(loss, params)))
    # megatron-core's cross-entropy rounds float64 to float32, the one here does not
    rounding = 1e-12 * size if params[0].dtype is torch.float64 else 0.0
    if gap > (1e-6 * size if changed else max(16 * noise, rounding)):
        raise ArithmeticError(
            f"the twice differentiable gradient is {math.sqrt(gap / size):.1e} away from the stock one: "
            "use method: difference, and report the versions of Megatron and torch"
        )
    # one seed on every rank: parameters that several ranks hold get one direction
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in params]
    scale = math.sqrt(size / square(noise))
    v = [g + scale * n for g, n in zip(stock, noise, strict=True)]
    step, error = hvp.tuned_step(loss, params, v, square=square)
    difference = hvp.hessian_vector_product(loss, params, v, "difference", step=step)
    with twice_differentiable(model):
        exact = hvp.hessian_vector_product(loss, params, v, "exact", step=step)
    gap, size = math.sqrt(square(_minus(difference, exact))), math.sqrt(square(difference))
    if gap > 3 * error + 1e-3 * size:
        raise ArithmeticError(
            f"the exact Hessian-vector product is {gap / size:.1e} away from a difference good to "
            f"{error / size:.0e}: use method: difference, and report the versions of Megatron and torch"
        )


def _tensor_parallel(group=None):
    if group is not None:
        return group
    return sys.modules[_CORE + "parallel_state"].get_tensor_model_parallel_group()


def _holders(model):
    """The modules of a model and the configs they share, each once: where Megatron keeps its
    switches.
    """
    modules = list(model.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(getattr(m, "config", None), "__dict__")}
    return modules + list(configs.values())


def _reads(holder, name):
    return vars(holder).get(name)


def _swap(stack, holder, name, value):
    stack.callback(setattr, holder, name, getattr(holder, name))
    setattr(holder, name, value)


def _minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]
