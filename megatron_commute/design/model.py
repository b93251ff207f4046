"""The proxy's model: a small GPT-2 or Llama as a pure function of one flat vector."""

import dataclasses
import math

import torch
from torch.nn import functional

FLAVOURS = ("gpt2", "llama")
SPREAD = 0.02  # of initial weights, as both families begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a model. Raises ValueError for one that cannot be built."""

    flavour: str = "gpt2"
    # or "llama": RMSNorm, rotary positions, SwiGLU, no biases, an output layer of its own
    layers: int = 2
    # blocks
    hidden: int = 48
    # width
    heads: int = 2
    # of attention
    sequence: int = 32
    # tokens that a sequence predicts
    vocabulary: int = 512
    # tokens that the model knows

    def __post_init__(self):
        if self.flavour not in FLAVOURS:
            raise ValueError(f"flavour={self.flavour}: write {' or '.join(FLAVOURS)}")
        for name in ("layers", "hidden", "heads", "sequence", "vocabulary"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: write a whole number above 0")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden={self.hidden}: write a multiple of 2 x heads = {2 * self.heads}")


def parts(shape):
    """{name: size} of the parameters of a Shape."""
    return _gpt2(shape) if shape.flavour == "gpt2" else _llama(shape)


def parameters(shape):
    """How many parameters a Shape has."""
    return sum(math.prod(size) for size in parts(shape).values())


class Model:
    """A model of P parameters, whose gradients and products are functions of theta [P]; it holds
    no weights.
    """

    def __init__(self, *, shape, dtype=torch.float32, device="cpu"):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.parts = parts(shape)
        self.sizes = [math.prod(size) for size in self.parts.values()]
        self.size = sum(self.sizes)
        self._buffer = torch.zeros(self.size, dtype=dtype, device=device)
        self._leaves = [leaf.detach().requires_grad_(True) for leaf in self.unflat(self._buffer)]
        matrices = [
            torch.full((n,), float(len(s) > 1)) for s, n in zip(self.parts.values(), self.sizes, strict=True)
        ]
        self.decayed = torch.cat(matrices).to(device, dtype)
        self._turns = _turns(shape, dtype, device) if shape.flavour == "llama" else None

    def initial(self, seed):
        """Weights [P] at the start of a run."""
        generator, found = torch.Generator().manual_seed(int(seed)), []
        for name, size in self.parts.items():
            if len(size) > 1:
                deep = name.endswith(("out", "down"))
                spread = SPREAD / math.sqrt(2 * self.shape.layers) if deep else SPREAD
                found.append(torch.randn(size, generator=generator).flatten() * spread)
            else:
                found.append(torch.full(size, float(name.endswith("scale"))))
        return torch.cat(found).to(self.device, self.dtype)

    def unflat(self, vector):
        """Views of a vector [P] in the shapes of the parameters."""
        pieces = vector.split(self.sizes)
        return [piece.view(size) for piece, size in zip(pieces, self.parts.values(), strict=True)]

    def sequence_losses(self, parameters, tokens, twice=False):
        """Mean loss in nats per token of every sequence [b]; tokens i64[b, t + 1].

        twice: with attention that can be differentiated twice.
        """
        named = dict(zip(self.parts, parameters, strict=True))
        forward = _forward_gpt2 if self.shape.flavour == "gpt2" else _forward_llama
        logits = forward(self, named, tokens[:, :-1], _attention if twice else _fused_attention)
        losses = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).mean(1)

    def gradient(self, theta, tokens, scale, direction=None, length=0.0):
        """(gradient [P] of sum_i scale_i loss_i, loss of every sequence [b]) at theta [P], moved by
        length x direction [P] where one is given.
        """
        if direction is None:
            self._buffer.copy_(theta)
        else:
            torch.add(theta, direction, alpha=length, out=self._buffer)
        losses = self.sequence_losses(self._leaves, tokens)
        found = torch.autograd.grad((losses * scale).sum(), self._leaves)
        return torch.cat([g.reshape(-1) for g in found]), losses.detach()

    def product(self, theta, tokens, scale, direction):
        """(Hessian of sum_i scale_i loss_i times direction [P], slope of every loss along it [b]),
        by double backward.
        """
        self._buffer.copy_(theta)
        # a row of ones whose gradient is the slope of each sequence's loss
        ones = torch.ones(len(tokens), dtype=self.dtype, device=self.device, requires_grad=True)
        losses = self.sequence_losses(self._leaves, tokens, twice=True)
        unit = torch.autograd.grad((losses * ones).sum(), self._leaves, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(unit, self.unflat(direction), strict=True))
        (slopes,) = torch.autograd.grad(along, ones, retain_graph=True)
        weighted = torch.autograd.grad((losses * scale).sum(), self._leaves, create_graph=True)
        along = sum((g * d).sum() for g, d in zip(weighted, self.unflat(direction), strict=True))
        found = torch.autograd.grad(along, self._leaves)
        return torch.cat([g.reshape(-1) for g in found]), slopes.detach()

    def mean_gradient(self, theta, tokens, at_once=64):
        """Gradient [P] of the mean loss over tokens i64[n, t + 1]."""
        total = torch.zeros_like(theta)
        for part in tokens.split(at_once):
            scale = torch.full((len(part),), 1 / len(tokens), dtype=self.dtype, device=self.device)
            total += self.gradient(theta, part, scale)[0]
        return total

    @torch.no_grad()
    def mean_loss(self, theta, tokens, at_once=64):
        """Mean loss in nats per token over tokens i64[n, t + 1]."""
        self._buffer.copy_(theta)
        parts = [self.sequence_losses(self._leaves, part) for part in tokens.split(at_once)]
        return float(torch.cat(parts).double().mean())


def _gpt2(shape):
    h, found = (
        shape.hidden,
        {"words": (shape.vocabulary, shape.hidden), "positions": (shape.sequence, shape.hidden)},
    )
    for i in range(shape.layers):
        found |= {f"{i}.first.scale": (h,), f"{i}.first.bias": (h,)}
        found |= {
            f"{i}.qkv": (3 * h, h),
            f"{i}.qkv.bias": (3 * h,),
            f"{i}.out": (h, h),
            f"{i}.out.bias": (h,),
        }
        found |= {f"{i}.second.scale": (h,), f"{i}.second.bias": (h,)}
        found |= {
            f"{i}.up": (4 * h, h),
            f"{i}.up.bias": (4 * h,),
            f"{i}.down": (h, 4 * h),
            f"{i}.down.bias": (h,),
        }
    return found | {"last.scale": (h,), "last.bias": (h,)}


def _llama(shape):
    h, found = shape.hidden, {"words": (shape.vocabulary, shape.hidden)}
    inner = 8 * max(1, round(h / 3))  # SwiGLU's three matrices of 8/3 h hold what two of 4 h hold
    for i in range(shape.layers):
        found |= {f"{i}.first.scale": (h,), f"{i}.qkv": (3 * h, h), f"{i}.out": (h, h)}
        found |= {
            f"{i}.second.scale": (h,),
            f"{i}.gate": (inner, h),
            f"{i}.up": (inner, h),
            f"{i}.down": (h, inner),
        }
    return found | {"last.scale": (h,), "logits": (shape.vocabulary, h)}


def _forward_gpt2(model, p, tokens, attention):
    h = model.shape.hidden
    x = functional.embedding(tokens, p["words"]) + p["positions"][: tokens.shape[1]]
    for i in range(model.shape.layers):
        normed = functional.layer_norm(x, (h,), p[f"{i}.first.scale"], p[f"{i}.first.bias"])
        q, k, v = _heads(functional.linear(normed, p[f"{i}.qkv"], p[f"{i}.qkv.bias"]), model.shape.heads)
        x = x + functional.linear(_joined(attention(q, k, v)), p[f"{i}.out"], p[f"{i}.out.bias"])
        normed = functional.layer_norm(x, (h,), p[f"{i}.second.scale"], p[f"{i}.second.bias"])
        inner = functional.gelu(functional.linear(normed, p[f"{i}.up"], p[f"{i}.up.bias"]))
        x = x + functional.linear(inner, p[f"{i}.down"], p[f"{i}.down.bias"])
    return functional.layer_norm(x, (h,), p["last.scale"], p["last.bias"]) @ p["words"].T


def _forward_llama(model, p, tokens, attention):
    h = model.shape.hidden
    x = functional.embedding(tokens, p["words"])
    turns = [turn[: tokens.shape[1]] for turn in model._turns]
    for i in range(model.shape.layers):
        normed = functional.rms_norm(x, (h,), p[f"{i}.first.scale"], 1e-5)
        q, k, v = _heads(functional.linear(normed, p[f"{i}.qkv"]), model.shape.heads)
        seen = attention(_turned(q, turns), _turned(k, turns), v)
        x = x + functional.linear(_joined(seen), p[f"{i}.out"])
        normed = functional.rms_norm(x, (h,), p[f"{i}.second.scale"], 1e-5)
        gate = functional.silu(functional.linear(normed, p[f"{i}.gate"]))
        x = x + functional.linear(gate * functional.linear(normed, p[f"{i}.up"]), p[f"{i}.down"])
    return functional.rms_norm(x, (h,), p["last.scale"], 1e-5) @ p["logits"].T


def _heads(qkv, heads):
    b, t, _ = qkv.shape
    return qkv.view(b, t, 3, heads, -1).permute(2, 0, 3, 1, 4)


def _joined(seen):
    return seen.transpose(1, 2).flatten(2)


def _fused_attention(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention(q, k, v):
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def _turns(shape, dtype, device):
    """Cosines and sines [t, d / 2] of rotary positions."""
    width = shape.hidden // shape.heads
    speeds = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(shape.sequence, dtype=torch.float64), speeds)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _turned(x, turns):
    cosine, sine = turns
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)
