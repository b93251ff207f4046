"""Plain-torch references of every compiled kernel, with its signature: slow, short and right in
every dtype.

"Dual" means a value and its tangent along a direction u; the prefix d stands for the tangent. gx is
the gradient of the loss with respect to x, dgx its tangent: at a parameter p, gp is the gradient
and dgp is (H u)_p (Pearlmutter, Neural Computation 6(1), 1994, the R operator). Half precision is
computed in float32 and float64 in itself; results come back in the dtype of x (q, logits),
statistics and gradients of norms and biases in the dtype of the arithmetic. Inputs are never
written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

NORMS, ACTIVATIONS = ("layer", "rms"), ("gelu_tanh", "gelu_erf", "swiglu")
_TANH, _CUBIC = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form
# Elements of all vectors together that are held in float64 at a time: about one in 64 of a vector,
# so that the copies do not count beside the vectors themselves, within bounds that keep a CPU's
# cache and a GPU's kernels busy.
_CHUNK_SHARE, _LEAST_CHUNK, _CHUNK = 64, 1 << 18, 1 << 22


def norm_forward(x, dx, weight, dweight, bias, dbias, eps, kind):
    """y, dy [n, h] of LayerNorm ("layer") or RMSNorm ("rms") of x, dx [n, h], and saved [n, 4].

    weight, dweight [h]; bias, dbias [h] or None; eps: what is added to the variance (the mean
    square). saved: mean, 1/std and their tangents, for norm_backward. Raises ValueError for an
    unknown kind.
    """
    _known(kind, NORMS)
    dtype, (x, dx, weight, dweight) = x.dtype, _wide(x, dx, weight, dweight)
    zero = torch.zeros_like(x[:, :1])
    mean, dmean = (x.mean(1, True), dx.mean(1, True)) if kind == "layer" else (zero, zero)
    rstd = ((x - mean).square().mean(1, True) + eps).rsqrt()
    drstd = -rstd.pow(3) * ((x - mean) * (dx - dmean)).mean(1, True)
    saved = torch.cat([mean, rstd, dmean, drstd], 1)
    unit, dunit = _normed(x, dx, saved)
    y, dy = unit * weight, dunit * weight + unit * dweight
    if bias is not None:
        y, dy = y + bias, dy + dbias
    return y.to(dtype), dy.to(dtype), saved


def norm_backward(gy, dgy, x, dx, saved, weight, dweight, kind):
    """gx, dgx [n, h], gweight, dgweight [h], gbias, dgbias [h] (None for "rms"), from gy, dgy [n,
    h] and the inputs.

    The last four are sums over rows in the dtype of `saved`.
    """
    _known(kind, NORMS)
    dtype, (gy, dgy, x, dx, weight, dweight) = x.dtype, _wide(gy, dgy, x, dx, weight, dweight)
    unit, dunit = _normed(x, dx, saved)
    rstd, drstd = saved[:, 1:2], saved[:, 3:4]
    g, dg = gy * weight, dgy * weight + gy * dweight
    along, dalong = (g * unit).mean(1, True), (dg * unit + g * dunit).mean(1, True)
    rest, drest = g - unit * along, dg - dunit * along - unit * dalong
    if kind == "layer":
        rest, drest = rest - g.mean(1, True), drest - dg.mean(1, True)
    gx, dgx = rest * rstd, drest * rstd + rest * drstd
    gweight, dgweight = (gy * unit).sum(0), (dgy * unit + gy * dunit).sum(0)
    gbias, dgbias = (gy.sum(0), dgy.sum(0)) if kind == "layer" else (None, None)
    return gx.to(dtype), dgx.to(dtype), gweight, dgweight, gbias, dgbias


def activation_forward(x, dx, bias, dbias, kind):
    """y, dy [n, f] of "gelu_tanh", "gelu_erf" or "swiglu" at x + bias.

    x, dx [n, f], for swiglu [n, 2f], the gate in its first half; bias, dbias [f] ([2f]) or None.
    """
    _known(kind, ACTIVATIONS)
    dtype, x, dx = x.dtype, *_biased(x, dx, bias, dbias)
    if kind == "swiglu":
        (gate, up), (dgate, dup) = x.chunk(2, 1), dx.chunk(2, 1)
        value, slope, _ = _silu(gate)
        y, dy = value * up, slope * dgate * up + value * dup
    else:
        value, slope, _ = _gelu(x, kind)
        y, dy = value, slope * dx
    return y.to(dtype), dy.to(dtype)


def activation_backward(gy, dgy, x, dx, bias, dbias, kind):
    """gx, dgx [n, f] ([n, 2f] for swiglu) and gbias, dgbias, their sums over rows (None without a
    bias).
    """
    _known(kind, ACTIVATIONS)
    dtype, has_bias, (gy, dgy) = x.dtype, bias is not None, _wide(gy, dgy)
    x, dx = _biased(x, dx, bias, dbias)
    if kind == "swiglu":
        (gate, up), (dgate, dup) = x.chunk(2, 1), dx.chunk(2, 1)
        value, slope, curve = _silu(gate)
        gx = torch.cat([gy * up * slope, gy * value], 1)
        dgate_slope = (dgy * up + gy * dup) * slope + gy * up * curve * dgate
        dgx = torch.cat([dgate_slope, dgy * value + gy * slope * dgate], 1)
    else:
        _, slope, curve = _gelu(x, kind)
        gx, dgx = gy * slope, dgy * slope + gy * curve * dx
    gbias, dgbias = (gx.sum(0), dgx.sum(0)) if has_bias else (None, None)
    return gx.to(dtype), dgx.to(dtype), gbias, dgbias


def cross_entropy_statistics(logits, dlogits, labels, first):
    """What a shard of the vocabulary knows of each token's loss: [n, 5] in the dtype of the
    arithmetic.

    logits, dlogits [n, v]: words first .. first + v of the vocabulary; labels int64 [n], any word
    of it. Columns: the maximum m of the shard, sum exp(l - m), sum exp(l - m) dl, the label's logit
    and its tangent (both 0 where the label lies in another shard).
    """
    logits, dlogits = _wide(logits, dlogits)
    top = logits.max(1, True).values
    powers = (logits - top).exp()
    place, here = _place(labels, first, logits.shape[1])
    own, down = ((t.gather(1, place) * here) for t in (logits, dlogits))
    return torch.cat([top, powers.sum(1, True), (powers * dlogits).sum(1, True), own, down], 1)


def combine_statistics(shards):
    """Statistics [n, 5] of the whole vocabulary from those of its shards, a list of [n, 5]."""
    table = torch.stack(list(shards))
    top = table[..., 0].max(0).values
    scale = (table[..., 0] - top).exp()
    sums = torch.cat([table[..., 1:3] * scale[..., None], table[..., 3:]], -1).sum(0)
    return torch.cat([top[:, None], sums], 1)


def cross_entropy_loss(statistics, scale):
    """loss and dloss, numbers: the sum over n tokens of scale times the cross-entropy in nats, and
    its tangent.

    statistics [n, 5] of the whole vocabulary; scale: 1/number of tokens gives the mean.
    """
    top, total, dtotal, own, down = statistics.unbind(1)
    return scale * (top + total.log() - own).sum(), scale * (dtotal / total - down).sum()


def cross_entropy_backward(logits, dlogits, labels, first, statistics, scale):
    """glogits, dglogits [n, v] of cross_entropy_loss; arguments as there and in
    cross_entropy_statistics.

    statistics: of the whole vocabulary (combine_statistics over its shards).
    """
    dtype, (logits, dlogits) = logits.dtype, _wide(logits, dlogits)
    top, total, dtotal = statistics[:, 0:1], statistics[:, 1:2], statistics[:, 2:3]
    softmax = (logits - top).exp() / total
    dsoftmax = softmax * (dlogits - dtotal / total)
    place, here = _place(labels, first, logits.shape[1])
    softmax = softmax.scatter_add(1, place, -here.to(softmax.dtype))
    return (scale * softmax).to(dtype), (scale * dsoftmax).to(dtype)


def attention_forward(q, dq, k, dk, v, dv, scale):
    """o, do [b, a, s, c] of causal attention softmax(scale q k') v, and saved [b, a, s, 2].

    q, dq [b, a, s, c]; k, dk, v, dv [b, g, s, c], a % g == 0: query head i attends to group i // (a
    / g). saved: the log-sum-exp of each row of scores and its tangent. Materialises the s x s
    scores of all heads.
    """
    shape, dtype = q.shape, q.dtype
    q, dq, k, dk, v, dv = _heads(q, dq, k, dk, v, dv)
    score, dscore = _scores(q, dq, k, dk, scale, shape[2])
    total = score.logsumexp(-1, True)
    p = (score - total).exp()
    dtotal = (p * dscore).sum(-1, True)
    dp = p * (dscore - dtotal)
    o, do = p @ v, dp @ v + p @ dv
    saved = torch.cat([total, dtotal], -1).view(*shape[:3], 2)
    return o.to(dtype).view(shape), do.to(dtype).view(shape), saved


def attention_backward(go, dgo, q, dq, k, dk, v, dv, o, do, saved, scale):
    """gq, dgq [b, a, s, c], gk, dgk, gv, dgv [b, g, s, c] from go, dgo [b, a, s, c] and the
    forward's inputs and results.
    """
    shapes, dtype = (q.shape, q.shape, *[k.shape] * 4), q.dtype
    go, dgo, q, dq, k, dk, v, dv, o, do = _heads(go, dgo, q, dq, k, dk, v, dv, o, do, groups=k.shape[1])
    saved = saved.reshape(*q.shape[:2], 2)
    score, dscore = _scores(q, dq, k, dk, scale, shapes[0][2])
    p = (score - saved[..., :1]).exp()
    dp = p * (dscore - saved[..., 1:])
    gp, dgp = go @ v.mT, dgo @ v.mT + go @ dv.mT
    along, dalong = (go * o).sum(-1, True), (dgo * o + go * do).sum(-1, True)
    gs = scale * p * (gp - along)
    dgs = scale * (dp * (gp - along) + p * (dgp - dalong))
    gq, dgq = gs @ k, dgs @ k + gs @ dk
    gk, dgk = gs.mT @ q, dgs.mT @ q + gs.mT @ dq
    gv, dgv = p.mT @ go, dp.mT @ go + p.mT @ dgo
    slopes = gq, dgq, gk, dgk, gv, dgv
    return tuple(t.to(dtype).view(shape) for t, shape in zip(slopes, shapes, strict=True))


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
    minus) / (2 eps), a central difference. Sums run over the tensors of this rank alone: shards of
    a vector are summed by the caller. Raises ValueError when a list is empty, shapes differ, or one
    of minus and eps comes without the other.
    """
    if not X or not Y or not X[0]:
        raise ValueError("gram needs at least one vector on either side, each with at least one tensor")
    if (minus is None) != (eps is None) or eps == 0:
        raise ValueError("gram takes minus and a nonzero eps together: X stands for (X - minus) / (2 eps)")
    if minus is not None and len(minus) != len(X):
        raise ValueError(f"X and minus have {len(X)} and {len(minus)} vectors: give as many of either")
    for name, vectors in (
        ("X", X),
        ("Y", Y),
        ("metric", [] if metric is None else [metric]),
        ("minus", minus or []),
    ):
        for k, vector in enumerate(vectors):
            check_shapes(X[0], vector, f"X[0] and {name}[{k}]" if name != "metric" else "X[0] and metric")
    result = torch.zeros(len(X), len(Y), dtype=torch.float64, device=X[0][0].device)
    size = sum(tensor.numel() for tensor in X[0])
    held = len(X) * (2 if minus else 1) + len(Y)
    chunk = max(1, min(max(size // _CHUNK_SHARE, _LEAST_CHUNK), _CHUNK) // held)
    for i, tensor in enumerate(X[0]):
        for begin in range(0, tensor.numel(), chunk):
            left = _rows(X, i, begin, chunk)
            if minus is not None:
                left = (left - _rows(minus, i, begin, chunk)) / (2 * eps)
            if metric is not None:
                left *= _rows([metric], i, begin, chunk)
            plain = Y is X and metric is None and minus is None
            result += left @ (left if plain else _rows(Y, i, begin, chunk)).T
    return result


def displace(
    params: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    eps: float,
    metric: Sequence[torch.Tensor] | None = None,
    realised: bool = False,
) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """New tensors params + eps D v with the dtype of params; params are not touched and no graph is
    kept.

    params, v, metric (the diagonal D, or None): lists of tensors with the same shapes. eps: a
    number. realised: also return what was really added, in float32 (float64), which differs from
    eps D v where params are half precision. Raises ValueError when shapes differ.
    """
    check_shapes(params, v, "params and v")
    if metric is not None:
        check_shapes(params, metric, "params and metric")
    with torch.no_grad():
        along = v if metric is None else [u * d for u, d in zip(v, metric, strict=True)]
        # half precision is rounded once, after the sum
        moved = [
            torch.add(*_wide(p, u), alpha=eps).to(p.dtype)
            if p.dtype in (torch.float16, torch.bfloat16)
            else torch.add(p, u.to(p.dtype), alpha=eps)
            for p, u in zip(params, along, strict=True)
        ]
        if not realised:
            return moved
        return moved, [torch.sub(*_wide(new, p)) for new, p in zip(moved, params, strict=True)]


def check_shapes(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], names: str) -> None:
    """Raise ValueError naming the first tensor in which a and b differ in number or shape."""
    if len(a) != len(b):
        raise ValueError(
            f"{names} have {len(a)} and {len(b)} tensors: give one tensor per parameter, in one order"
        )
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape:
            raise ValueError(f"{names} differ at tensor {i}: shapes {tuple(x.shape)} and {tuple(y.shape)}")


def _known(kind, kinds):
    if kind not in kinds:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(kinds)}")


def _wide(*tensors):
    """Tensors in the dtype of the arithmetic: float64 where the first is, else float32."""
    wide = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    return [t.to(wide) for t in tensors]


def _normed(x, dx, saved):
    mean, rstd, dmean, drstd = saved[:, :, None].unbind(1)
    return (x - mean) * rstd, (dx - dmean) * rstd + (x - mean) * drstd


def _biased(x, dx, bias, dbias):
    x, dx = _wide(x, dx)
    return (x, dx) if bias is None else (x + bias, dx + dbias)


def _gelu(x, kind):
    """GELU, its slope and its curvature."""
    if kind == "gelu_erf":
        below, density = torch.special.ndtr(x), (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)
        return x * below, below + x * density, density * (2 - x * x)
    t = (_TANH * (x + _CUBIC * x**3)).tanh()
    inner, s = _TANH * (1 + 3 * _CUBIC * x * x), 1 - t * t
    curve = s * inner + x * s * (3 * _TANH * _CUBIC * x - t * inner * inner)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * s * inner, curve


def _silu(x):
    s = x.sigmoid()
    return x * s, s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))


def _place(labels, first, size):
    """Column of each label in a shard [n, 1], 0 where it lies in another, and whether it lies in
    this one.
    """
    place = labels[:, None] - first
    here = (place >= 0) & (place < size)
    return place.where(here, torch.zeros_like(place)), here


def _heads(*tensors, groups=None):
    """[b, heads, s, c] -> [b * groups, rows, c]: the queries of a group one below the other."""
    groups = groups or tensors[2].shape[1]
    return [t.reshape(t.shape[0] * groups, -1, t.shape[-1]) for t in _wide(*tensors)]


def _scores(q, dq, k, dk, scale, s):
    """scale q k', -inf where the key comes after the query, and its tangent."""
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1).repeat(q.shape[1] // s, 1)
    score = (scale * (q @ k.mT)).masked_fill(future, -math.inf)
    return score, scale * (dq @ k.mT + q @ dk.mT)


def _rows(vectors: Sequence[Sequence[torch.Tensor]], i: int, begin: int, chunk: int) -> torch.Tensor:
    """Elements begin.. of tensor i of every vector: a new float64 [len(vectors), <= chunk]."""
    return torch.stack([v[i].detach().reshape(-1)[begin : begin + chunk].double() for v in vectors])
