"""Arguments of every kernel, at any size and in any dtype."""

import torch

from megatron_commute import ops
from megatron_commute.kernels import reference


def draw(*shapes, seed=0, dtype=torch.float64):
    """Normal numbers that float32 and bfloat16 hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(s, generator=generator, dtype=torch.float32).bfloat16().to(dtype) for s in shapes]
    return found if len(found) > 1 else found[0]


def cases(n, h):
    """name, function, arguments in float64 for every kernel at n rows of h columns."""
    x, dx, gy, dgy = draw((n, h), (n, h), (n, h), (n, h))
    w, dw, b, db = draw((h,), (h,), (h,), (h,), seed=1)
    for kind in ("layer", "rms"):
        bias = (b, db) if kind == "layer" else (None, None)
        yield f"norm_forward {kind}", "norm_forward", (x, dx, w, dw, *bias, 1e-5, kind)
        saved = reference.norm_forward(x, dx, w, dw, *bias, 1e-5, kind)[2]
        yield f"norm_backward {kind}", "norm_backward", (gy, dgy, x, dx, saved, w, dw, kind)
    for kind in ("gelu_tanh", "gelu_erf", "swiglu"):
        wide = h // 2 if kind == "swiglu" else h
        if wide == 0 or (kind == "swiglu" and h % 2):
            continue
        for bias in ((b, db), (None, None)):
            arguments = (3 * x, dx, *bias, kind)
            yield f"activation_forward {kind}", "activation_forward", arguments
            yield (
                f"activation_backward {kind}",
                "activation_backward",
                (gy[:, :wide], dgy[:, :wide], *arguments),
            )
    labels = torch.arange(n) * 7 % (2 * h) + 5
    yield "cross_entropy_statistics", "cross_entropy_statistics", (5 * x, dx, labels, 5)
    statistics = reference.cross_entropy_statistics(5 * x, dx, labels, 5)
    yield "cross_entropy_backward", "cross_entropy_backward", (5 * x, dx, labels, 5, statistics, 1 / n)


def heads(b=2, a=4, g=2, s=37, c=24):
    """The same for attention; b samples, a heads, g groups of keys, s places, c columns."""
    q, dq, go, dgo = draw(*[(b, a, s, c)] * 4)
    k, dk, v, dv = draw(*[(b, g, s, c)] * 4, seed=1)
    inputs, scale = (q, dq, k, dk, v, dv), c**-0.5
    yield "attention_forward", "attention_forward", (*inputs, scale)
    kept = reference.attention_forward(*inputs, scale)
    yield "attention_backward", "attention_backward", (go, dgo, *inputs, *kept, scale)


def converted(arguments, dtype):
    """Arguments in dtype; saved and statistics in the dtype of the sums."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def one(t):
        if not isinstance(t, torch.Tensor) or t.dtype is torch.int64:
            return t
        kept = (t.dim() == 2 and t.shape[1] in (4, 5)) or (t.dim() == 4 and t.shape[3] == 2)
        return t.to(wide if kept else dtype).contiguous()

    return tuple(one(t) for t in arguments)


def results(found):
    return [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]


def distance(found, truth):
    """|found - truth| over |truth|, or over 0.1 an element where truth is small."""
    size = max(truth.double().norm().item(), 0.1 * truth.numel() ** 0.5)
    return (found.double() - truth.double()).norm().item() / size if truth.numel() else 0.0


def compiled(function, given):
    return results(getattr(ops, function)(*given))


def errors(function, arguments, dtype, run=compiled):
    """(error, limit) of every result against float64; limit: twice what plain PyTorch errs in this
    dtype, and eight roundings."""
    given = converted(arguments, dtype)
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in given]
    truth = results(getattr(reference, function)(*exact))
    plain = results(getattr(reference, function)(*given))
    for f, p, t in zip(run(function, given), plain, truth, strict=True):
        assert f.dtype is p.dtype and f.shape == t.shape, function
        # float32 sums do not suffer from the dtype of the rows
        rounding = 1e-13 if f.dtype is torch.float64 else 8 * torch.finfo(torch.float32).eps
        yield distance(f, t), 2 * distance(p, t) + rounding
