"""Independent plain-torch language models, in primitives, for judging what the product computes on
megatron's models.

Both take tokens int64 [b, t] and return logits [b, t, vocabulary]; every operation has native first and
second derivatives. `language_loss` turns a model into a loss of a list of parameters; `gpt_from_megatron`
reads the state of a megatron GPTModel (all tensor-parallel shards of it) into the plain GPT.
"""

import math
import re

import numpy as np
import torch
from torch import nn


def attention(q, k, v):
    """Causal softmax attention: q, k, v [b, heads, t, size] -> [b, t, heads * size]; the heads of k and v
    may be fewer."""
    b, heads, t, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    score = q @ k.transpose(2, 3) / math.sqrt(size)
    future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    return (score.masked_fill(future, -10000.0).softmax(-1) @ v).transpose(1, 2).reshape(b, t, heads * size)


def layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, base=10000.0):
    """Rotary position embedding of x [b, heads, t, size]; element i is paired with element i + size/2."""
    t, half = x.shape[2], x.shape[3] // 2
    angle = torch.outer(torch.arange(t), base ** (-torch.arange(half) / half)).to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


class GPT(nn.Module):
    """LayerNorm, GELU, learned positions, biases, output tied to the word embedding (GPT-2, in megatron's
    pre-norm form)."""

    def __init__(self, vocabulary=32, width=16, heads=4, layers=2, length=8, gelu="none", spread=0.02):
        super().__init__()
        self.heads, self.gelu = heads, gelu
        self.words = nn.Parameter(spread * torch.randn(vocabulary, width))
        self.positions = nn.Parameter(spread * torch.randn(length, width))
        self.blocks = nn.ModuleList()
        shapes = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width)}
        shapes["down"] = width, 4 * width
        for _ in range(layers):
            block = nn.ParameterDict()
            for name, shape in shapes.items():
                block[f"{name}_weight"] = nn.Parameter(spread * torch.randn(shape))
                block[f"{name}_bias"] = nn.Parameter(torch.zeros(shape[0]))
            for name in ("norm1", "norm2"):
                block[f"{name}_weight"] = nn.Parameter(torch.ones(width))
                block[f"{name}_bias"] = nn.Parameter(torch.zeros(width))
            self.blocks.append(block)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, tokens):
        b, t = tokens.shape
        x = self.words[tokens] + self.positions[:t]
        for p in self.blocks:
            y = layer_norm(x, p["norm1_weight"], p["norm1_bias"])
            y = y @ p["qkv_weight"].T + p["qkv_bias"]
            # megatron's order: per head its query, key and value side by side
            q, k, v = y.view(b, t, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
            x = x + attention(q, k, v) @ p["out_weight"].T + p["out_bias"]
            y = layer_norm(x, p["norm2_weight"], p["norm2_bias"])
            y = nn.functional.gelu(y @ p["up_weight"].T + p["up_bias"], approximate=self.gelu)
            x = x + y @ p["down_weight"].T + p["down_bias"]
        return layer_norm(x, self.norm_weight, self.norm_bias) @ self.words.T


class Llama(nn.Module):
    """RMSNorm, SwiGLU, rotary positions, grouped queries, no biases, untied output."""

    def __init__(self, vocabulary=32, width=16, heads=4, groups=2, layers=2, inner=24, spread=0.02):
        super().__init__()
        self.heads, self.groups = heads, groups
        size = width // heads
        self.words = nn.Parameter(spread * torch.randn(vocabulary, width))
        self.head = nn.Parameter(spread * torch.randn(vocabulary, width))
        self.norm = nn.Parameter(torch.ones(width))
        shapes = {"q": (heads * size, width), "k": (groups * size, width), "v": (groups * size, width)}
        shapes |= {"out": (width, heads * size), "gate": (inner, width), "up": (inner, width)}
        shapes["down"] = width, inner
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.ParameterDict({n: nn.Parameter(spread * torch.randn(s)) for n, s in shapes.items()})
            block["norm1"], block["norm2"] = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
            self.blocks.append(block)

    def forward(self, tokens):
        b, t = tokens.shape
        x = self.words[tokens]
        for p in self.blocks:
            y = rms_norm(x, p["norm1"])
            q = (y @ p["q"].T).view(b, t, self.heads, -1).transpose(1, 2)
            k, v = ((y @ p[n].T).view(b, t, self.groups, -1).transpose(1, 2) for n in ("k", "v"))
            x = x + attention(rotate(q), rotate(k), v) @ p["out"].T
            y = rms_norm(x, p["norm2"])
            gate = y @ p["gate"].T
            x = x + (gate * gate.sigmoid() * (y @ p["up"].T)) @ p["down"].T
        return rms_norm(x, self.norm) @ self.head.T


def cross_entropy(logits, labels):
    """Mean cross-entropy in nats, from primitives; logits [..., vocabulary], labels int64 [...]."""
    return (logits.logsumexp(-1) - logits.gather(-1, labels[..., None])[..., 0]).mean()


def batch(vocabulary=32, samples=4, length=8, seed=0):
    """Tokens and labels (the next token), int64 [samples, length] each, of a language in which every token
    has four possible successors: a model that has learned it from one batch knows something about the
    next."""
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=torch.Generator().manual_seed(-1))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocabulary, (samples, length + 1), generator=generator)
    choice = torch.randint(4, (samples, length + 1), generator=generator)
    for t in range(length):
        text[:, t + 1] = successors[text[:, t], choice[:, t]]
    return text[:, :-1], text[:, 1:]


def parameters(model):
    """(names, detached tensors) of the model's parameters, in the order of named_parameters."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    return list(names), [t.detach() for t in tensors]


def language_loss(model, tokens, labels):
    """Loss as a callable of a list of parameters, in the order of model.named_parameters()."""
    names = [n for n, _ in model.named_parameters()]

    def loss(params):
        state = dict(zip(names, params, strict=True))
        return cross_entropy(torch.func.functional_call(model, state, (tokens,)), labels)

    return loss


def product(loss, params, v):
    """H v by double backward in float64, the truth for difference and exact."""
    leaves = [p.detach().double().requires_grad_(True) for p in params]
    slopes = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    inner = sum((g * u.double()).sum() for g, u in zip(slopes, v, strict=True))
    return list(torch.autograd.grad(inner, leaves))


def inner(a, b):
    """a.b of two lists of tensors, in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def length(vector):
    return math.sqrt(inner(vector, vector))


def gap(a, b):
    """|a - b| / |b|."""
    return length([x.double() - y.double() for x, y in zip(a, b, strict=True)]) / length(b)


def train(model, vocabulary=32, samples=16, length=8, steps=80, rate=3e-3):
    """Train the model in place with Adam, each step on a new batch; a model that has left its
    initialisation."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for step in range(steps):
        tokens, labels = batch(vocabulary, samples, length, seed=10_000 + step)
        optimiser.zero_grad()
        cross_entropy(model(tokens), labels).backward()
        optimiser.step()
    return model


# megatron-core's names, then Megatron-DeepSpeed's
_MEGATRON = {
    "embedding.word_embeddings": "words", "embedding.position_embeddings": "positions",
    "final_layernorm": "norm",
    "input_layernorm": "norm1", "pre_mlp_layernorm": "norm2", "post_attention_layernorm": "norm2",
    "self_attention.linear_qkv": "qkv", "self_attention.linear_proj": "out",
    "self_attention.query_key_value": "qkv", "self_attention.dense": "out",
    "mlp.linear_fc1": "up", "mlp.linear_fc2": "down", "mlp.dense_h_to_4h": "up", "mlp.dense_4h_to_h": "down",
}  # fmt: skip
_SPLIT = dict.fromkeys(("qkv_weight", "qkv_bias", "up_weight", "up_bias", "words"), 0)
_SPLIT |= {"out_weight": 1, "down_weight": 1}


def plain_name(name):
    """The plain GPT's name of a parameter of a megatron GPTModel."""
    _, layer, rest = re.fullmatch(r"(?:(.*?)layers\.(\d+)\.)?(.*)", name).groups()
    part, kind = re.sub(r"^(language_model\.)?(encoder\.|decoder\.)?", "", rest).rsplit(".", 1)
    plain = _MEGATRON[part]
    if plain in ("words", "positions"):
        return plain
    return f"blocks.{layer}.{plain}_{kind}" if layer else f"{plain}_{kind}"


def split_dimension(name):
    """The dimension along which megatron splits a parameter over tensor-parallel ranks, None for a
    whole one."""
    return _SPLIT.get(plain_name(name).rsplit(".", 1)[-1])


def merge(name, shards, heads):
    """One tensor, in the plain GPT's layout, from what the tensor-parallel ranks hold of a megatron
    parameter.

    Megatron-DeepSpeed keeps all queries of a rank, then all keys, then all values; the rest keeps them head
    by head.
    """
    dim = split_dimension(name)
    if "query_key_value" in name:
        own = heads // len(shards)
        shards = [s.view(3, own, -1, *s.shape[1:]).transpose(0, 1).reshape(s.shape) for s in shards]
    return shards[0] if dim is None else torch.cat(list(shards), dim=dim)


def gpt_from_megatron(states, heads, gelu="none"):
    """The plain GPT in float64 with the weights of a GPTModel of megatron-core or Megatron-DeepSpeed.

    states: the state dicts of its tensor-parallel ranks in rank order (one without tensor parallelism); only
    tensors of parameters are read. Layout: local layer spec, learned positions, biases, GELU, tied output,
    vocabulary not padded.
    """
    state = {}
    for name, tensor in states[0].items():
        if torch.is_tensor(tensor) and not name.endswith("_extra_state"):
            state[plain_name(name)] = merge(name, [s[name].detach().double() for s in states], heads)
    vocabulary, width = state["words"].shape
    layers = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    model = GPT(vocabulary, width, heads, layers, state["positions"].shape[0], gelu).double()
    model.load_state_dict(state)
    return model


def text(domain, numbers, salt, vocabulary, length, likely):
    """i64[n, length + 1] of a domain: what follows a token is a fixed permutation of its own, `likely` so."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([int(domain), int(number), salt])
        follows = np.random.default_rng(int(domain)).permutation(vocabulary)
        row = rng.integers(vocabulary, size=length + 1)
        for i in range(length):
            row[i + 1] = follows[row[i]] if rng.random() < likely else row[i + 1]
        rows.append(row)
    return torch.from_numpy(np.array(rows))


def sequences(part, domain, numbers, vocabulary, length):
    """Held-out `text` of a part of a probe."""
    return text(domain, numbers, part == "direction", vocabulary, length, 0.7)
