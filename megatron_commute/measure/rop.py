"""The R operator on a GPT stack: loss, gradient and Hessian-vector product of one batch in one
pass, without autograd.

Pearlmutter (Neural Computation 6(1), 1994): differentiate the forward and the backward pass along
u. Every layer carries its value and its tangent forward, its gradient and its tangent backward; the
tangent of a parameter's gradient is H u there. In units of one matrix product of a layer a gradient
costs 3, H u alone 8 (8/3 of a gradient), with the gradient of the same batch 9 (9/3). Exact to
rounding; what it computes is the mean cross-entropy in nats of causal language modelling, without
dropout. Not covered: mixtures of experts, sequence, pipeline and context parallelism.

A Stack is a description alone: numbers of parameters in a list that every call brings, so that
probes can pass tensors of their own. Parameters, u and tokens are read, never written.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch

from megatron_commute import ops, reduce
from megatron_commute.measure.rop_layers import (
    Block,
    Linear,
    Norm,
    Rotary,
    Slopes,
    Weights,
    backward,
    forward,
    linear,
    linear_backward,
    norm,
    norm_backward,
    summed,
)

__all__ = ["Block", "Dual", "Linear", "Norm", "Rotary", "Stack", "gradient_and_product"]

# tokens of whole sequences that go through the stack at a time: enough for large matrix products,
# few enough for what is kept between the passes not to count beside the parameters
_ROWS = {"cpu": 1024, "cuda": 1 << 14}
# logits of a slice of tokens that exist at a time, value and tangent each: few enough for a CPU's
# cache, enough for a GPU
_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """A GPT on this rank: words (+ positions), blocks, norm, output; parameters by number."""

    words: int
    # [vocabulary of this rank, width]
    positions: int | None
    # [positions, width], or None
    blocks: tuple[Block, ...]
    # in order
    norm: Norm
    # before the output
    output: int
    # [vocabulary of this rank, width]; the words where they are tied
    rotary: Rotary | None
    # tables of the blocks that rotate
    names: tuple[str, ...]
    # of the parameters, for messages


class Dual(NamedTuple):
    """loss: mean in nats per token; slope: its derivative along u; gradient g (None unless asked
    for) and product H u.
    """

    loss: float
    slope: float
    gradient: list[torch.Tensor] | None
    product: list[torch.Tensor]


@torch.no_grad()
def gradient_and_product(stack, params, u, tokens, group=None, *, gradient=True, dtype=None) -> Dual:
    """loss, g and H u of one batch.

    params, u: lists of float32 (float64) tensors with the same shapes. tokens: i64[b, s + 1], of
    the whole vocabulary; each of the s first predicts the next. group: the tensor-parallel process
    group, or None; parameters that its ranks share are given, and come back, alike on each.
    gradient: False leaves g out, at 8/9 of the cost. dtype: of matrix products and activations;
    None takes that of params, torch.bfloat16 keeps sums over tokens of norms and biases, statistics
    and results in float32.

    Raises ValueError for shapes that differ, tokens outside the vocabulary, or sequences longer
    than the positions; FloatingPointError when the loss or its derivative along u is not finite.
    """
    dtype = _checked(stack, params, u, tokens, group, dtype)
    weights, slopes = Weights(params=params, u=u, dtype=dtype), Slopes(params, wanted=gradient)
    totals, length = torch.zeros(2, dtype=torch.float64), tokens.shape[1] - 1
    at_once = max(1, _ROWS["cuda" if tokens.is_cuda else "cpu"] // length)
    for part in tokens.split(at_once):
        share = 1.0 / (tokens.shape[0] * length)
        totals += torch.tensor(_pass(stack, part, share, weights, slopes, group), dtype=torch.float64)
    for i in range(len(params)):
        slopes.zeros(i)
    loss, slope = totals.tolist()
    return Dual(loss=loss, slope=slope, gradient=slopes.gradient, product=slopes.product)


def _pass(stack, tokens, share, weights, slopes, group):
    """share times the sums over tokens of the losses and of their derivatives along u; adds as much
    to `slopes`.
    """
    inputs, labels, length = tokens[:, :-1].reshape(-1), tokens[:, 1:].reshape(-1), tokens.shape[1] - 1
    x, dx = _embed(stack, inputs, length, weights, group)
    kept = []
    for block in stack.blocks:
        x, dx, needed = forward(block, x, dx, weights, length, stack.rotary, group)
        kept.append(needed)
    del needed
    loss, slope, gx, dgx = _output(stack, x, dx, labels, share, weights, slopes, group)
    if not math.isfinite(loss + slope):
        raise FloatingPointError(
            f"loss {loss}, derivative along u {slope}: check the batch, the weights and u"
        )
    del x, dx
    for block in reversed(stack.blocks):
        gx, dgx = backward(block, gx, dgx, kept.pop(), weights, slopes, length, stack.rotary, group)
    _embed_backward(stack, gx, dgx, inputs, length, slopes, group)
    return loss, slope


def _checked(stack, params, u, tokens, group, dtype):
    """The dtype of the matrix products; raises where the input does not fit the stack."""
    ops.check_shapes(params, u, "params and u")
    if len(params) != len(stack.names):
        raise ValueError(
            f"the stack has {len(stack.names)} parameters, got {len(params)}: give all of them in order"
        )
    kinds = {t.dtype for t in (*params, *u)}
    if kinds not in ({torch.float32}, {torch.float64}):
        found = ", ".join(sorted(str(kind) for kind in kinds))
        raise ValueError(f"params and u must all be float32 or all float64, got {found}: convert them")
    if tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.shape[0] == 0:
        raise ValueError(f"tokens must be [b, s + 1] with b, s > 0, got {list(tokens.shape)}")
    vocabulary = params[stack.words].shape[0] * reduce.size(group)
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(
            f"token {int(tokens.max())} is outside the vocabulary of {vocabulary}: check the tokenizer"
        )
    positions = None if stack.positions is None else params[stack.positions].shape[0]
    for most in (positions, None if stack.rotary is None else stack.rotary.cos.shape[0]):
        if most is not None and tokens.shape[1] - 1 > most:
            raise ValueError(
                f"sequences of {tokens.shape[1] - 1} tokens, but only {most} positions: cut them"
            )
    return dtype or params[0].dtype


def _embed(stack, inputs, length, weights, group):
    """x, dx [n, width] of the tokens i64[n]."""
    rows, absent = _own_rows(stack, inputs, weights.params, group)
    x, dx = (t[rows] for t in (weights.params[stack.words], weights.u[stack.words]))
    if absent is not None:
        x[absent], dx[absent] = 0.0, 0.0
        x, dx = summed(x, dx, group)
    if stack.positions is not None:
        places = weights.params[stack.positions][:length], weights.u[stack.positions][:length]
        for t, place in zip((x, dx), places, strict=True):
            t.view(-1, length, t.shape[1]).add_(place)
    return x.to(weights.dtype), dx.to(weights.dtype)


def _own_rows(stack, inputs, params, group):
    """Rows of this rank's words, and which tokens are none of them (None without tensor
    parallelism).
    """
    if reduce.size(group) == 1:
        return inputs, None
    here = params[stack.words].shape[0]
    rows = inputs - reduce.rank_in(group) * here
    absent = (rows < 0) | (rows >= here)
    return rows.masked_fill(absent, 0), absent


def _embed_backward(stack, gx, dgx, inputs, length, slopes, group):
    if stack.positions is not None:
        slopes.zeros(stack.positions)
        for vector, t in ((slopes.gradient, gx), (slopes.product, dgx)):
            if vector is not None:
                vector[stack.positions][:length] += t.view(-1, length, t.shape[1]).sum(0)
    rows, absent = _own_rows(stack, inputs, slopes.params, group)
    if absent is not None:
        gx, dgx = (t.masked_fill(absent[:, None], 0.0) for t in (gx, dgx))
    slopes.add_rows(stack.words, rows, gx, dgx)


def _output(stack, x, dx, labels, scale, weights, slopes, group):
    """loss, slope, and gx, dgx [n, width] before the last norm: the output layer there and back,
    some tokens at a time.
    """
    y, dy, saved = norm(x, dx, stack.norm, weights)
    pair = weights(stack.output)
    first = reduce.rank_in(group) * pair[0].shape[0]
    gy, dgy = torch.empty_like(y), torch.empty_like(dy)
    totals = torch.zeros(2, dtype=torch.float64, device=y.device)
    step = max(32, _LOGITS["cuda" if y.is_cuda else "cpu"] // pair[0].shape[0])
    for begin in range(0, len(labels), step):
        part, dpart, own = (t[begin : begin + step] for t in (y, dy, labels))
        logits, dlogits = linear(part, dpart, pair)
        statistics = _combined(ops.cross_entropy_statistics(logits, dlogits, own, first), group)
        totals += torch.stack(ops.cross_entropy_loss(statistics, scale))
        g, dg = ops.cross_entropy_backward(logits, dlogits, own, first, statistics, scale)
        del logits, dlogits
        slopes.add_matrix(stack.output, g, dg, part, dpart)
        gy[begin : begin + step], dgy[begin : begin + step] = linear_backward(g, dg, pair)
    gy, dgy = summed(gy, dgy, group)
    gx, dgx = norm_backward(gy, dgy, x, dx, saved, stack.norm, weights, slopes)
    return *totals.tolist(), gx, dgx


def _combined(statistics, group):
    """Statistics of the whole vocabulary from those of this rank's shard."""
    if reduce.size(group) == 1:
        return statistics
    top = reduce.all_reduce_max(statistics[:, 0], group)
    scaled = statistics.clone()
    scaled[:, 1:3] *= (statistics[:, :1] - top[:, None]).exp()
    scaled = reduce.all_reduce_sum(scaled, group)
    scaled[:, 0] = top
    return scaled
