"""The Hessian-vector products that hvp.py measures, on one plain GPT: theirs and ours.

Every method is a callable () -> H u that takes as much as it needs; `methods` gives those that are installed.
"""

import importlib.util
import math
import sys
import weakref
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("tests/support", "")]

import rop_cases

from megatron_commute import hvp
from megatron_commute.measure import rop


class Case:
    """A GPT-2 of the given size with random weights, a batch, and a direction.

    Its loss is written with torch's fused functions, as one would write it for speed; attention is materialised as in
    Megatron's local layers.
    """

    def __init__(self, vocabulary, width, heads, blocks, length, samples):
        self.size = {"vocabulary": vocabulary, "width": width, "heads": heads, "blocks": blocks}
        self.heads, self.length, self.samples = heads, length, samples
        form = rop_cases.GPT2 | {"groups": heads}
        self.stack, shapes = rop_cases.build(form, **self.size, length=length, inner=4 * width)
        self.params = rop_cases.random_vector(self.stack, shapes, 1, torch.float32, 0.02)
        self.u = rop_cases.random_vector(self.stack, shapes, 2, torch.float32, 1.0)
        self.tokens = rop_cases.random_tokens(samples, length, vocabulary)
        self.inputs, self.labels = self.tokens[:, :-1], self.tokens[:, 1:]

    @property
    def parameters(self):
        return sum(p.numel() for p in self.params)

    def floors(self):
        """Matrix products of H u alone, and with the gradient, over those of a gradient: 8/3, 9/3; attention 9/3 in both."""
        linear = 12 * self.size["width"] * self.size["blocks"] + self.size["vocabulary"]
        attention = 2 * self.length * self.size["blocks"]
        return (8 * linear + 9 * attention) / (3 * (linear + attention)), 3.0

    def logits(self, p):
        """[b * s, vocabulary] from a list of parameters."""
        b, s = self.inputs.shape
        mask = torch.ones(s, s, dtype=torch.bool, device=self.inputs.device).triu(1)
        x = F.embedding(self.inputs, p[self.stack.words]) + p[self.stack.positions][:s]

        def linear(layer, x):
            return F.linear(x, p[layer.weight], p[layer.bias])

        def norm(layer, x):
            return F.layer_norm(x, x.shape[-1:], p[layer.weight], p[layer.bias], layer.eps)

        for block in self.stack.blocks:
            qkv = linear(block.qkv, norm(block.norm1, x)).view(b, s, self.heads, 3, -1)
            q, k, v = qkv.permute(3, 0, 2, 1, 4)
            o = ((q @ k.mT) * block.scale).masked_fill(mask, -math.inf).softmax(-1) @ v
            x = x + linear(block.out, o.transpose(1, 2).reshape(b, s, -1))
            y = F.gelu(linear(block.up, norm(block.norm2, x)), approximate="tanh")
            x = x + linear(block.down, y)
        return F.linear(norm(self.stack.norm, x), p[self.stack.output]).flatten(0, 1)

    def loss(self, p):
        return F.cross_entropy(self.logits(p), self.labels.flatten())


class Module(torch.nn.Module):
    """A Case as a module without arguments that matter: what curvlinops takes."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.weights = torch.nn.ParameterList([p.clone() for p in case.params])

    def forward(self, inputs):
        return self.case.logits(list(self.weights))


def methods(case):
    """{name: () -> H u}; curvlinops where it is installed."""
    loss, params, u = case.loss, case.params, case.u
    found = {
        "central difference": lambda: hvp.gradient_and_product(loss, params, u, step=1e-4).product,
        "double backward": lambda: hvp.gradient_and_product(loss, params, u, "exact", step=1.0).product,
        "torch.func jvp of grad": lambda: torch.func.jvp(torch.func.grad(lambda *p: loss(p), tuple(range(len(params)))),
                                                         tuple(params), tuple(u))[1],
        "R operator, H u alone": lambda: rop.gradient_and_product(
            case.stack, params, u, case.tokens, gradient=False
        ).product,
        "R operator, loss, g and H u": lambda: rop.gradient_and_product(case.stack, params, u, case.tokens).product,
    }  # fmt: skip
    if importlib.util.find_spec("curvlinops"):
        found["curvlinops"] = of_curvlinops(case)
    return found


def of_curvlinops(case):
    import curvlinops

    module = Module(case)
    operator = curvlinops.HessianLinearOperator(
        module,
        torch.nn.CrossEntropyLoss(),
        list(module.parameters()),
        [(case.inputs, case.labels.flatten())],
        check_deterministic=False,
    )
    return lambda: operator @ case.u


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are born inside and still alive: `most` is their largest sum."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, torch.Tensor):
                self._note(t.untyped_storage())
        return found

    def _note(self, storage):
        if storage._cdata in self.live:
            return
        self.live.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, address, size):
        self.live.discard(address)
        self.now -= size


def peak(function):
    """Bytes of tensors that a call holds at its worst, beyond those that were there before."""
    with Peak() as seen:
        function()
    return seen.most
