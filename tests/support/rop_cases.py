"""Small GPTs as stacks of rop.py, with the same arithmetic in plain torch for autograd to differentiate."""

import math

import torch
from torch.nn import functional as F

from megatron_commute.measure import rop

# the smallest that still tells every size apart
VOCABULARY, WIDTH, HEADS, LENGTH, BLOCKS, INNER = 19, 24, 4, 7, 2, 10
GPT2 = {
    "norm": "layer",
    "positions": True,
    "rotary": None,
    "groups": 4,
    "activation": "gelu_tanh",
    "bias": True,
    "tied": True,
    "layout": "grouped",
}
LLAMA = {
    "norm": "rms",
    "positions": False,
    "rotary": (6, False),
    "groups": 2,
    "activation": "swiglu",
    "bias": False,
    "tied": False,
    "layout": "grouped",
}
CASES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gelu by erf, untied": GPT2 | {"activation": "gelu_erf", "tied": False},
    "no biases but those of norms": GPT2 | {"bias": False},
    "rms norms, biases, parts": GPT2 | {"norm": "rms", "layout": "parts"},
    "part of each head rotated, interleaved": LLAMA | {"rotary": (4, True), "bias": True},
    "one group, rotated and learned positions": LLAMA | {"groups": 1, "positions": True, "tied": True, "rotary": (4, False)},
    "parts, grouped queries": LLAMA | {"layout": "parts", "activation": "gelu_tanh"},
}  # fmt: skip


def build(case, vocabulary=VOCABULARY, width=WIDTH, heads=HEADS, length=LENGTH, blocks=BLOCKS, inner=INNER):
    """(rop.Stack, shapes of its parameters) of one of CASES."""
    shapes, names = [], []

    def parameter(name, *shape):
        names.append(name)
        shapes.append(shape)
        return len(names) - 1

    def linear(name, outputs, inputs):
        weight = parameter(f"{name}.weight", outputs, inputs)
        bias = parameter(f"{name}.bias", outputs) if case["bias"] else None
        return rop.Linear(weight=weight, bias=bias)

    def norm(name):
        weight = parameter(f"{name}.weight", width)
        bias = parameter(f"{name}.bias", width) if case["norm"] == "layer" else None
        return rop.Norm(weight=weight, bias=bias, eps=1e-5, kind=case["norm"])

    words = parameter("words", vocabulary, width)
    positions = parameter("positions", length + 2, width) if case["positions"] else None
    size, wide = width // heads, 2 if case["activation"] == "swiglu" else 1
    made = []
    for i in range(blocks):
        name = f"blocks.{i}"
        block = rop.Block(
            norm1=norm(f"{name}.norm1"),
            qkv=linear(f"{name}.qkv", (heads + 2 * case["groups"]) * size, width),
            out=linear(f"{name}.out", width, width),
            norm2=norm(f"{name}.norm2"),
            up=linear(f"{name}.up", wide * inner, width),
            down=linear(f"{name}.down", width, inner),
            heads=heads,
            groups=case["groups"],
            layout=case["layout"],
            scale=size**-0.5,
            rotary=case["rotary"] is not None,
            activation=case["activation"],
        )
        made.append(block)
    last = norm("norm")
    output = words if case["tied"] else parameter("output", vocabulary, width)
    rotary = None
    if case["rotary"] is not None:
        turned, interleaved = case["rotary"]
        angles = torch.outer(torch.arange(length + 1), 50.0 ** -torch.linspace(0, 1, turned // 2))
        rotary = rop.Rotary(cos=angles.cos(), sin=angles.sin(), interleaved=interleaved)
    stack = rop.Stack(
        words=words,
        positions=positions,
        blocks=tuple(made),
        norm=last,
        output=output,
        rotary=rotary,
        names=tuple(names),
    )
    return stack, shapes


def random_vector(stack, shapes, seed, dtype=torch.float64, spread=0.4):
    """One tensor per parameter; norms near one when they are weights to be used (spread < 1)."""
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(shape, generator=generator, dtype=torch.float64) * spread for shape in shapes]
    if spread < 1:
        for i in (stack.norm.weight, *(n.weight for b in stack.blocks for n in (b.norm1, b.norm2))):
            vector[i] += 1.0
    return [t.to(dtype) for t in vector]


def random_tokens(samples=3, length=LENGTH, vocabulary=VOCABULARY, seed=0):
    return torch.randint(vocabulary, (samples, length + 1), generator=torch.Generator().manual_seed(seed))


def loss(stack, tokens):
    """Mean cross-entropy of a stack by torch's own functions: a callable of the list of parameters."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]

    def of(p):
        def apply(layer, x):
            return F.linear(x, p[layer.weight], None if layer.bias is None else p[layer.bias])

        def normed(layer, x):
            if layer.kind == "layer":
                return F.layer_norm(x, x.shape[-1:], p[layer.weight], p[layer.bias], layer.eps)
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.eps) * p[layer.weight]

        x = p[stack.words][inputs]
        if stack.positions is not None:
            x = x + p[stack.positions][: inputs.shape[1]]
        for block in stack.blocks:
            x = x + apply(block.out, attended(stack, block, apply(block.qkv, normed(block.norm1, x))))
            x = x + apply(block.down, activated(block, apply(block.up, normed(block.norm2, x))))
        return F.cross_entropy(
            F.linear(normed(stack.norm, x), p[stack.output]).flatten(0, 1), labels.flatten()
        )

    return of


def activated(block, x):
    if block.activation == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(x, approximate="tanh" if block.activation == "gelu_tanh" else "none")


def attended(stack, block, x):
    b, s, _ = x.shape
    a, g = block.heads, block.groups
    if block.layout == "grouped":
        heads = x.view(b, s, g, a // g + 2, -1).unbind(3)
        q, k, v = torch.stack(heads[:-2], 3).flatten(2, 3), *heads[-2:]
    else:
        size = x.shape[-1] // (a + 2 * g)
        q, k, v = (t.view(b, s, -1, size) for t in x.split([a * size, g * size, g * size], -1))
    if block.rotary:
        q, k = turned(q, stack.rotary), turned(k, stack.rotary)
    q, k, v = (t.transpose(1, 2).repeat_interleave(a // t.shape[2], 1) for t in (q, k, v))
    score = (q @ k.mT * block.scale).masked_fill(torch.ones(s, s, device=x.device).triu(1).bool(), -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)


def turned(x, rotary):
    """x [b, s, heads, c] as complex numbers times exp(i angle); complex numbers of half precision do not exist."""
    half, wide = rotary.cos.shape[1], x.float() if x.dtype is torch.bfloat16 else x
    turn = torch.complex(rotary.cos, rotary.sin)[: x.shape[1], None].to(wide.dtype.to_complex())
    pairs = wide[..., : 2 * half].unflatten(-1, (half, 2) if rotary.interleaved else (2, half))
    pairs = pairs if rotary.interleaved else pairs.mT
    new = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    new = (new if rotary.interleaved else new.mT).flatten(-2)
    return torch.cat([new.to(x.dtype), x[..., 2 * half :]], -1)
