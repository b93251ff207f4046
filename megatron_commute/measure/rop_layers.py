"""The parts of a GPT stack under the R operator: every function takes and returns values and
tangents.

x, dx: a value and its tangent along the direction u, rows of tokens [n, width]. gx, dgx: the
gradient of the loss with respect to x and its tangent. No autograd graph is built. Under tensor
parallelism a column-parallel layer (qkv, up, output) reads whole rows and gives this rank's
columns; a row-parallel one (out, down) reads columns and gives partial sums of whole rows. The sums
over ranks stand where Megatron has them: Reduce after a row-parallel layer forward, and its adjoint
Copy before a column-parallel layer backward (Shoeybi et al., arXiv 1909.08053, figure 3), each for
value and tangent in one call.
"""

from __future__ import annotations

import dataclasses

import torch

from megatron_commute import ops, reduce


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """LayerNorm or RMSNorm."""

    weight: int
    # number of the parameter
    bias: int | None
    # likewise; None for RMSNorm
    eps: float
    # added to the variance
    kind: str
    # "layer" or "rms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """y = x W' + bias."""

    weight: int
    # number of the parameter, [outputs, inputs]
    bias: int | None = None
    # likewise, [outputs], or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """norm1, attention, residual, norm2, MLP, residual."""

    norm1: Norm
    # before the attention
    qkv: Linear
    # queries, keys and values
    out: Linear
    # of the attention
    norm2: Norm
    # before the MLP
    up: Linear
    # of the MLP; swiglu has its gate in the first half of the outputs
    down: Linear
    # of the MLP
    heads: int
    # query heads of this rank
    groups: int
    # key-value groups of this rank
    layout: str
    # of the outputs of qkv: "grouped", per group its queries, its key, its value (megatron-core),
    # or "parts", all queries, all keys, all values (Megatron-DeepSpeed)
    scale: float
    # of the scores
    rotary: bool
    # whether queries and keys are rotated
    activation: str
    # see reference.ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Tables of the rotation of the first `size` elements of each head."""

    cos: torch.Tensor
    # float32 [positions, size / 2]
    sin: torch.Tensor
    # likewise
    interleaved: bool = False
    # whether element 2 i is paired with 2 i + 1; else i with i + size / 2


class Weights:
    """Parameters and their tangents u in the dtype of the matrix products."""

    def __init__(self, *, params, u, dtype):
        self.params, self.u, self.dtype = params, u, dtype

    def __call__(self, i):
        """Value and tangent of parameter i; two None for None."""
        return (None, None) if i is None else (self.params[i].to(self.dtype), self.u[i].to(self.dtype))


class Slopes:
    """Gradient g and product H u, collected one parameter at a time; a parameter that is used twice
    adds up.

    wanted: whether the gradient is collected too. Half-precision contributions are added up in the
    dtype of params.
    """

    def __init__(self, params, *, wanted):
        self.params = params
        self.gradient = [None] * len(params) if wanted else None
        self.product = [None] * len(params)

    def add(self, i, g, dg):
        """Add a gradient and its tangent of parameter i (None: of nothing)."""
        if i is None:
            return
        for into, t in ((self.gradient, g), (self.product, dg)):
            if into is not None:
                into[i] = t.to(self.params[i].dtype) if into[i] is None else into[i].add_(t)

    def add_sums(self, i, g, dg):
        """Add the sums over rows of g, dg [n, width] to parameter i (None: to nothing)."""
        if i is not None:
            dtype = self.params[i].dtype
            self.add(i, g.sum(0, dtype=dtype), dg.sum(0, dtype=dtype))

    def add_matrix(self, i, gy, dgy, x, dx):
        """Add gy' x and its tangent dgy' x + gy' dx, the slopes of the weight of y = x W'."""
        if self.gradient is not None:
            self.gradient[i] = self._product(self.gradient[i], i, gy, x)
        self.product[i] = self._product(self.product[i], i, dgy, x)
        self.product[i] = self._product(self.product[i], i, gy, dx)

    def _product(self, into, i, gy, x):
        if into is None:
            return (gy.t() @ x).to(self.params[i].dtype)
        return into.addmm_(gy.t(), x) if into.dtype is x.dtype else into.add_(gy.t() @ x)

    def zeros(self, i):
        """Make sure that parameter i has its sums."""
        for into in (self.gradient, self.product):
            if into is not None and into[i] is None:
                into[i] = torch.zeros_like(self.params[i])

    def add_rows(self, i, rows, g, dg):
        """Add g, dg [n, width] to the rows i64[n] of parameter i."""
        self.zeros(i)
        for into, t in ((self.gradient, g), (self.product, dg)):
            if into is None:
                continue
            if t.is_cuda:  # index_add_ adds in any order there
                into[i].index_put_((rows,), t.to(into[i].dtype), accumulate=True)
            else:
                into[i].index_add_(0, rows, t.to(into[i].dtype))


def summed(a, da, group):
    """Sum of a value and its tangent over tensor-parallel ranks, in one collective."""
    if reduce.size(group) == 1:
        return a, da
    return reduce.all_reduce_sum(torch.stack([a, da]), group).unbind(0)


def linear(x, dx, pair, biases=(None, None)):
    """y, dy of y = x W' (+ bias)."""
    (weight, dweight), (bias, dbias) = pair, biases
    if bias is None:
        y, dy = x @ weight.t(), dx @ weight.t()
    else:
        y, dy = torch.addmm(bias, x, weight.t()), torch.addmm(dbias, dx, weight.t())
    return y, dy.addmm_(x, dweight.t())


def linear_backward(gy, dgy, pair):
    """gx, dgx of y = x W'."""
    weight, dweight = pair
    return gy @ weight, (dgy @ weight).addmm_(gy, dweight)


def row_parallel(x, dx, layer, weights, residual, group):
    """residual + x W' + bias, its partial sums over ranks included."""
    (y, dy), (bias, dbias) = residual, weights(layer.bias)
    weight, dweight = weights(layer.weight)
    if bias is not None:
        y, dy = y + bias, dy + dbias
    if reduce.size(group) > 1:
        part, dpart = summed(*linear(x, dx, (weight, dweight)), group)
        return part.add_(y), dpart.add_(dy)
    if bias is None:
        return torch.addmm(y, x, weight.t()), torch.addmm(dy, dx, weight.t()).addmm_(x, dweight.t())
    return y.addmm_(x, weight.t()), dy.addmm_(dx, weight.t()).addmm_(x, dweight.t())


def norm(x, dx, layer, weights):
    """y, dy and what norm_backward needs."""
    weight, bias = weights(layer.weight), weights(layer.bias)
    return ops.norm_forward(x, dx, *weight, *bias, layer.eps, layer.kind)


def norm_backward(gy, dgy, x, dx, saved, layer, weights, slopes):
    gx, dgx, *sums = ops.norm_backward(gy, dgy, x, dx, saved, *weights(layer.weight), layer.kind)
    slopes.add(layer.weight, *sums[:2])
    slopes.add(layer.bias, *sums[2:])
    return gx, dgx


def forward(block, x, dx, weights, length, rotary, group):
    """x, dx [n, width] after the block, and what its backward pass needs. length: tokens of a
    sequence.

    The outputs of norms and activation are not kept: they are computed again on the way back.
    """
    a, da, norm1 = norm(x, dx, block.norm1, weights)
    heads = _split(block, linear(a, da, weights(block.qkv.weight), weights(block.qkv.bias)), length, rotary)
    del a, da
    o, do, saved = ops.attention_forward(*heads, block.scale)
    y, dy = row_parallel(_merge(o), _merge(do), block.out, weights, (x, dx), group)
    e, de, norm2 = norm(y, dy, block.norm2, weights)
    f, df = linear(e, de, weights(block.up.weight))
    del e, de
    z, dz = ops.activation_forward(f, df, *weights(block.up.bias), block.activation)
    out = row_parallel(z, dz, block.down, weights, (y, dy), group)
    return *out, (x, dx, norm1, heads, (o, do, saved), y, dy, norm2, f, df)


def backward(block, gx, dgx, kept, weights, slopes, length, rotary, group):
    """gx, dgx [n, width] before the block, which takes over those after it; adds to `slopes`."""
    x, dx, norm1, heads, attended, y, dy, norm2, f, df = kept
    _mlp_backward(block, gx, dgx, (y, dy, norm2, f, df), weights, slopes, group)
    del kept, y, dy, norm2, f, df
    o, do = _merge(attended[0]), _merge(attended[1])
    slopes.add_matrix(block.out.weight, gx, dgx, o, do)
    slopes.add_sums(block.out.bias, gx, dgx)
    del o, do
    found = linear_backward(gx, dgx, weights(block.out.weight))
    go, dgo = (_heads(t, block.heads, length) for t in found)
    found = ops.attention_backward(go, dgo, *heads, *attended, block.scale)
    del go, dgo, attended
    g, dg = _join(block, found, x.shape[0], length, rotary)
    del heads, found
    a, da, _ = norm(x, dx, block.norm1, weights)
    slopes.add_matrix(block.qkv.weight, g, dg, a, da)
    slopes.add_sums(block.qkv.bias, g, dg)
    found = summed(*linear_backward(g, dg, weights(block.qkv.weight)), group)
    found = norm_backward(*found, x, dx, norm1, block.norm1, weights, slopes)
    return gx.add_(found[0]), dgx.add_(found[1])


def _mlp_backward(block, gx, dgx, kept, weights, slopes, group):
    """Take gx, dgx, in place, back through the MLP, its norm and the residual around them."""
    y, dy, norm2, f, df = kept
    biases = weights(block.up.bias)
    z, dz = ops.activation_forward(f, df, *biases, block.activation)
    slopes.add_matrix(block.down.weight, gx, dgx, z, dz)
    slopes.add_sums(block.down.bias, gx, dgx)
    del z, dz
    found = linear_backward(gx, dgx, weights(block.down.weight))
    g, dg, *sums = ops.activation_backward(*found, f, df, *biases, block.activation)
    del found
    slopes.add(block.up.bias, *sums)
    e, de, _ = norm(y, dy, block.norm2, weights)
    slopes.add_matrix(block.up.weight, g, dg, e, de)
    del e, de
    found = summed(*linear_backward(g, dg, weights(block.up.weight)), group)
    del g, dg
    found = norm_backward(*found, y, dy, norm2, block.norm2, weights, slopes)
    gx.add_(found[0])
    dgx.add_(found[1])


def _heads(x, heads, length):
    """[b * s, a * c] -> [b, a, s, c], a copy."""
    return x.view(-1, length, heads, x.shape[1] // heads).transpose(1, 2).contiguous()


def _merge(x):
    """[b, a, s, c] -> [b * s, a * c], a copy."""
    b, a, s, c = x.shape
    return x.transpose(1, 2).reshape(b * s, a * c)


def _views(block, qkv, length):
    """Queries [b, g, a/g, s, c], keys and values [b, g, 1, s, c] as views of the outputs of the
    linear layer.
    """
    each = block.heads // block.groups
    size = qkv.shape[1] // (block.heads + 2 * block.groups)
    if block.layout == "grouped":
        whole = qkv.view(-1, length, block.groups, each + 2, size).permute(0, 2, 3, 1, 4)
        return whole.split([each, 1, 1], dim=2)
    q, k, v = qkv.view(-1, length, qkv.shape[1]).split(
        [block.heads * size, block.groups * size, block.groups * size], 2
    )
    return [t.unflatten(2, (block.groups, -1, size)).permute(0, 2, 3, 1, 4) for t in (q, k, v)]


def _split(block, pair, length, rotary):
    """q, dq, k, dk, v, dv [b, heads, s, c], rotated where the block says so, from qkv and its
    tangent.
    """
    found = []
    for views in zip(*(_views(block, t, length) for t in pair), strict=True):
        turn = rotary if block.rotary and len(found) < 4 else None
        for view in views:
            new = view.new_empty(view.shape)
            _rotate(view, new, turn, 1)
            found.append(new.flatten(1, 2))
    return found


def _join(block, found, rows, length, rotary):
    """qkv-shaped gradient and tangent [n, outputs] from gq, dgq, gk, dgk, gv, dgv: the adjoint of
    _split.
    """
    size = found[0].shape[-1]
    pair = [found[0].new_empty(rows, (block.heads + 2 * block.groups) * size) for _ in range(2)]
    for i, views in enumerate(zip(*(_views(block, t, length) for t in pair), strict=True)):
        turn = rotary if block.rotary and i < 2 else None
        for view, t in zip(views, found[2 * i : 2 * i + 2], strict=True):
            _rotate(t.view(view.shape), view, turn, -1)
    return pair


def _rotate(source, target, rotary, sign):
    """Write source, rotated by sign times the angles of its positions, to target (both [..., s,
    c]); None: a copy.
    """
    if rotary is None:
        target.copy_(source)
        return
    length, half = source.shape[-2], rotary.cos.shape[1]
    cos, sin = (t[:length].to(source.dtype) for t in (rotary.cos, rotary.sin))
    if rotary.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    for here, there, way in ((first, second, -sign), (second, first, sign)):
        turned = target[..., here]
        torch.mul(source[..., here], cos, out=turned).addcmul_(source[..., there], sin, value=way)
    target[..., 2 * half :] = source[..., 2 * half :]
