"""Fused arithmetic on dual numbers and on vectors of model size: compiled kernels where they fit,
else the references.

Every function has the arguments, results and formulas of its namesake in reference.py; what is said
here holds for all of them. A value comes with its tangent (prefix d) along one direction. All
tensors of a call share one device and one dtype, except labels (int64), saved and statistics
(float32, or float64 with float64). Tensors that are not contiguous are copied, no graph is kept, no
rows give empty results and zero sums, NaN stays in the row it came from. Sizes and offsets are 64
bits wide. Results do not depend on the number of threads, torch.get_num_threads().

Compiled: float32, bfloat16 and float64 on the CPU; float32 and bfloat16 on CUDA, by kernels that
have been compiled and executed thread by thread on the CPU, never run on a GPU. Everything else,
and everything where a kernel could not be built, goes to the reference.
MEGATRON_COMMUTE_KERNELS=off in the environment, or `with references():`, does so by will. The
operators are torch.ops.megatron_commute.* with fake kernels, so that torch.compile and
FakeTensorMode see shapes.

All raise ValueError or TypeError naming the argument when shapes, devices or dtypes do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_commute.kernels import compiled as _kernels
from megatron_commute.kernels import reference
from megatron_commute.kernels.compiled import compiled, references, wide
from megatron_commute.kernels.reference import (
    ACTIVATIONS,
    NORMS,
    check_shapes,
    combine_statistics,
    cross_entropy_loss,
)

__all__ = [
    "activation_backward",
    "activation_forward",
    "attention_backward",
    "attention_forward",
    "check_shapes",
    "combine_statistics",
    "compiled",
    "cross_entropy_backward",
    "cross_entropy_loss",
    "cross_entropy_statistics",
    "displace",
    "gram",
    "norm_backward",
    "norm_forward",
    "references",
]
_MOST_VECTORS = 64  # of either side of one compiled gram

# Faces: check, take contiguous memory, call the operator.


def _fit(name, x, dimensions, others):
    """Tensors x and others {name: (tensor or None, shape, dtype)} contiguous, after checking them
    against x.
    """
    for label, t in ((name, x), *((label, t) for label, (t, _, _) in others.items())):
        if t is not None and not isinstance(t, torch.Tensor):
            raise TypeError(f"{label} is {type(t).__name__}: give a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}: give a floating-point tensor")
    if x.dim() != dimensions or 0 in x.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: give {dimensions} dimensions, only rows may be absent"
        )
    for label, (t, shape, dtype) in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{label} is on {t.device} and {name} on {x.device}: move one of them")
        if t.dtype is not dtype:
            raise TypeError(
                f"{label} has dtype {t.dtype}, needed is {dtype} with {name} in {x.dtype}: convert it"
            )
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{label} has shape {tuple(t.shape)}, needed is {tuple(shape)}")
    return [None if t is None else t.detach().contiguous() for t in (x, *(t for t, _, _ in others.values()))]


def _together(a, b, names):
    if (a is None) != (b is None):
        raise ValueError(f"give both of {names}, or neither")


def _kind(kind, kinds):
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(kinds)}")


def norm_forward(x, dx, weight, dweight, bias, dbias, eps, kind):
    """y, dy [n, h] of LayerNorm ("layer") or RMSNorm ("rms") of x, dx [n, h], and saved [n, 4]."""
    _kind(kind, NORMS)
    _together(bias, dbias, "bias and dbias")
    shape, t = x.shape, x.dtype
    row = shape[1:]
    others = {"dx": (dx, shape, t), "weight": (weight, row, t), "dweight": (dweight, row, t)}
    others |= {"bias": (bias, row, t), "dbias": (dbias, row, t)}
    return _kernels.norm_forward(*_fit("x", x, 2, others), float(eps), kind)


def norm_backward(gy, dgy, x, dx, saved, weight, dweight, kind):
    """gx, dgx [n, h]; gweight, dgweight, gbias, dgbias [h] float32 (float64), the last two None for
    "rms".
    """
    _kind(kind, NORMS)
    shape, t = x.shape, x.dtype
    row = shape[1:]
    others = {"gy": (gy, shape, t), "dgy": (dgy, shape, t), "dx": (dx, shape, t)}
    others |= {"saved": (saved, (*shape[:1], 4), wide(x)), "weight": (weight, row, t)}
    x, gy, dgy, dx, saved, weight, dweight = _fit("x", x, 2, {**others, "dweight": (dweight, row, t)})
    found = _kernels.norm_backward(gy, dgy, x, dx, saved, weight, dweight, kind)
    return found if kind == "layer" else (*found[:4], None, None)


def activation_forward(x, dx, bias, dbias, kind):
    """y, dy [n, f] of "gelu_tanh", "gelu_erf", "swiglu" (x [n, 2f], gate first) at x + bias."""
    x, dx, bias, dbias = _activation(x, dx, bias, dbias, kind, {})
    return _kernels.activation_forward(x, dx, bias, dbias, kind)


def activation_backward(gy, dgy, x, dx, bias, dbias, kind):
    """gx, dgx as x; gbias, dgbias, sums over rows in float32 (float64), None without bias."""
    shape = (*x.shape[:1], x.shape[-1] // 2) if kind == "swiglu" else x.shape
    gradients = {"gy": (gy, shape, x.dtype), "dgy": (dgy, shape, x.dtype)}
    x, dx, bias, dbias, gy, dgy = _activation(x, dx, bias, dbias, kind, gradients)
    found = _kernels.activation_backward(gy, dgy, x, dx, bias, dbias, kind)
    return (*found[:2], None, None) if bias is None else found


def _activation(x, dx, bias, dbias, kind, gradients):
    _kind(kind, ACTIVATIONS)
    _together(bias, dbias, "bias and dbias")
    shape, t = x.shape, x.dtype
    others = {"dx": (dx, shape, t), "bias": (bias, shape[1:], t), "dbias": (dbias, shape[1:], t)}
    fitted = _fit("x", x, 2, {**others, **gradients})
    if kind == "swiglu" and shape[1] % 2:
        raise ValueError(f"x has {shape[1]} columns: swiglu takes an even number, gate and up")
    return fitted


def cross_entropy_statistics(logits, dlogits, labels, first):
    """[n, 5] float32 (float64) of logits [n, v], words first .. first + v - 1: see reference."""
    others = {
        "dlogits": (dlogits, logits.shape, logits.dtype),
        "labels": (labels, logits.shape[:1], torch.int64),
    }
    return _kernels.cross_entropy_statistics(*_fit("logits", logits, 2, others), int(first))


def cross_entropy_backward(logits, dlogits, labels, first, statistics, scale):
    """glogits, dglogits [n, v]; statistics [n, 5] of the whole vocabulary, scale: 1/number of
    tokens for a mean.
    """
    others = {
        "dlogits": (dlogits, logits.shape, logits.dtype),
        "labels": (labels, logits.shape[:1], torch.int64),
    }
    others["statistics"] = (statistics, (*logits.shape[:1], 5), wide(logits))
    logits, dlogits, labels, statistics = _fit("logits", logits, 2, others)
    return _kernels.cross_entropy_backward(logits, dlogits, labels, int(first), statistics, float(scale))


def attention_forward(q, dq, k, dk, v, dv, scale):
    """o, do [b, a, s, c] of causal attention, k and v [b, g, s, c] with a % g == 0, and saved [b,
    a, s, 2].
    """
    return _kernels.attention_forward(*_heads(q, dq, k, dk, v, dv, {}), float(scale))


def attention_backward(go, dgo, q, dq, k, dk, v, dv, o, do, saved, scale):
    """gq, dgq [b, a, s, c], gk, dgk, gv, dgv [b, g, s, c] from go, dgo and forward's results."""
    others = {name: (t, q.shape, q.dtype) for name, t in (("go", go), ("dgo", dgo), ("o", o), ("do", do))}
    others["saved"] = (saved, (*q.shape[:3], 2), wide(q))
    *inputs, go, dgo, o, do, saved = _heads(q, dq, k, dk, v, dv, others)
    return _kernels.attention_backward(go, dgo, *inputs, o, do, saved, float(scale))


def _heads(q, dq, k, dk, v, dv, others):
    few = (*q.shape[:1], k.shape[1] if k.dim() == 4 else 0, *q.shape[2:])
    inputs = {"dq": (dq, q.shape, q.dtype)}
    inputs |= {name: (t, few, q.dtype) for name, t in (("k", k), ("dk", dk), ("v", v), ("dv", dv))}
    fitted = _fit("q", q, 4, {**inputs, **others})
    if few[1] == 0 or q.shape[1] % few[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {few[1]}: give a multiple of the heads of k")
    return fitted


def gram(
    X: Sequence[Sequence[torch.Tensor]],
    Y: Sequence[Sequence[torch.Tensor]],
    metric: Sequence[torch.Tensor] | None = None,
    minus: Sequence[Sequence[torch.Tensor]] | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Inner products M[k, m] = sum_i X[k]_i D_i Y[m]_i, float64 [K, M], on the device of the
    vectors.

    X: K vectors, Y: M vectors, each a list of tensors with the same shapes; metric: the diagonal D
    as such a list, or None for the identity. minus: K more vectors, with which X stands for (X -
    minus) / (2 eps). Sums run over the tensors of this rank alone. Compiled, every element is read
    once; dtypes may differ between tensors; below 2^20 elements, and with float64, sums are exact
    to float64, above to 3e-8 |X[k]| |Y[m]|: see csrc/gram.cpp.
    """
    vectors = [*X, *Y, *([] if metric is None else [metric]), *(minus or [])]
    tensors = [t for vector in vectors for t in vector]
    shapes = [t.shape for t in X[0]] if X else []
    fits = bool(X and Y and shapes) and all([t.shape for t in vector] == shapes for vector in vectors)
    fits &= all(t.device == tensors[0].device and compiled(t.device, t.dtype) for t in tensors)
    fits &= (minus is None) == (eps is None) and eps != 0 and (minus is None or len(minus) == len(X))
    if not fits or max(len(X), len(Y)) > _MOST_VECTORS:
        return reference.gram(X, Y, metric, minus, eps)  # which also says what does not fit
    same = X is Y and metric is None and minus is None
    flat = [t.detach().contiguous() for t in tensors]
    return _kernels.gram(flat, len(X), len(Y), metric is not None, 0.0 if eps is None else float(eps), same)


def displace(params, v, eps, metric=None, realised=False):
    """New tensors params + eps D v with the dtype of params; params are not touched and no graph is
    kept.

    params, v, metric (the diagonal D, or None): lists of tensors with the same shapes. eps: a
    number. realised: also return what was really added, in float32 (float64), which differs from
    eps D v where params are half precision.
    """
    lists = [params, v, *([] if metric is None else [metric])]
    if not all(compiled(t.device, t.dtype) and t.device.type == "cpu" for tensors in lists for t in tensors):
        return reference.displace(params, v, eps, metric, realised)
    check_shapes(params, v, "params and v")
    if metric is not None:
        check_shapes(params, metric, "params and metric")
    lists = [[t.detach().contiguous() for t in tensors] for tensors in lists]
    metrics = lists[2] if len(lists) > 2 else [None] * len(params)
    pairs = [
        _kernels.displace(p, u, d, float(eps), realised) for p, u, d in zip(*lists[:2], metrics, strict=True)
    ]
    moved = [pair[0] for pair in pairs]
    return (moved, [pair[1] for pair in pairs]) if realised else moved
