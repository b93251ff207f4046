"""A probe of a small GPT and its truth: every field from its definition, by double backward in float64."""

import numpy as np
import oracles
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe
from megatron_commute.settings.values import Probe

K, VOCABULARY, LENGTH = 3, 16, 6
WEIGHTS = np.array([0.5, 0.2, 0.3])
MIXED, EACH = np.array([[0.6, 0.4, 0.0]]), np.eye(K)
FLOW = (0.1, (0.02, 0.01))  # weight decay and the flow times of two windows


def settings(samples=16, splits=4, method="difference", metric="identity", memory="full", offload=False):
    how = {"samples": samples, "splits": splits, "method": method, "metric": metric}
    return Probe(**how, memory=memory, offload=offload)


def small_gpt(dtype=torch.float64):
    torch.manual_seed(3)
    return oracles.GPT(VOCABULARY, 8, 2, 1, LENGTH, spread=0.3).to(dtype)


def mean_loss(module, tokens):
    return oracles.cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])


def text(part, domain, numbers):
    return oracles.sequences(part, domain, numbers, VOCABULARY, LENGTH)


def moments(module):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.rand(p.shape, generator=generator, dtype=torch.float64) ** 4 * 1e-3 for p in module.parameters()
    ]


def model_of(module, micro_batch=3, groups=None):
    return torch_loop.probe_model(
        module, mean_loss, micro_batch, lambda: moments(module), groups=groups or reduce.Groups()
    )


def measured(module, how, targets=MIXED, groups=None, team=None, draw=text, **more):
    groups = groups or reduce.Groups()
    model = model_of(module, groups=groups)
    team = team or reduce.team(groups, how.splits)
    return probe.measure(model, groups, team, draw, how, targets, WEIGHTS, FLOW, **more)


def truth(module, how, targets, given=None):
    """Every field of a Measurement from its definition: double backward in float64, one replicate at a time.

    given: (t, split) -> the vector that stands for the gradient of target number t.
    """
    _, params = oracles.parameters(module.double())
    decayed = [p.dim() > 1 for p in params]
    D = [torch.ones_like(p) for p in params]
    if how.metric == "adam":
        roots = [v.sqrt() for v in moments(module)]
        floor = 0.1 * sum(float(r.sum()) for r in roots) / sum(r.numel() for r in roots)
        D = [1 / (r + floor) for r in roots]

    def loss(part, k, split, count):
        tokens = text(part, k, np.arange(split * count, (split + 1) * count))
        return oracles.language_loss(module, tokens[:, :-1], tokens[:, 1:])

    def gradient(value):
        leaves = [p.clone().requires_grad_(True) for p in params]
        return torch.autograd.grad(value(leaves), leaves)

    def dot(*vectors, only=None):
        terms = zip(*vectors, only or [True] * len(params), strict=True)
        return sum(float(torch.stack(t[:-1]).prod(0).sum()) for t in terms if t[-1])

    n, m, T = how.samples // how.splits, max(1, how.samples // how.splits // 2), len(targets)
    M, u_g, u_gd, h_theta = (np.zeros((how.splits, T, *shape)) for shape in ((K, K), (K,), (K,), (K,)))
    for split in range(how.splits):
        slopes = [gradient(loss("direction", k, split, m)) for k in range(K)]
        losses = [loss("gradient", k, split, n) for k in range(K)]
        g = [gradient(value) for value in losses]
        for t, target in enumerate(targets):
            toward = [sum(target[k] * slopes[k][i] for k in range(K)) for i in range(len(D))]
            u = [d * v for d, v in zip(D, given(t, split) if given else toward, strict=True)]
            for k in range(K):
                h = oracles.product(losses[k], params, u)
                M[split, t, k] = [dot(h, D, other) for other in g]
                u_g[split, t, k], u_gd[split, t, k] = dot(u, g[k]), dot(u, g[k], only=decayed)
                h_theta[split, t, k] = dot(h, params, only=decayed)
    P = M.swapaxes(-1, -2) - M
    s = np.einsum("stij,j->sti", P, WEIGHTS)
    decay, (e1, e2) = FLOW
    score = s + decay * (u_gd - h_theta) - (e1 - e2) / ((e1**2 + e2**2) / 2) * u_g
    score = score - np.einsum("stk,k->st", score, WEIGHTS)[..., None]
    fields = {"M": M, "P": P, "s": s, "u_g": u_g, "h_theta": h_theta, "score": score}
    spread = {f"{name}_se": standard_error(fields[name]) for name in ("P", "s", "score")}
    return {name: value.mean(0) for name, value in fields.items()} | spread | {"replicates": M}


def standard_error(values):
    S = len(values)
    return np.sqrt(((values - values.sum(0) / S) ** 2).sum(0) / (S - 1) / S)


def assert_close(found, expected, tolerance):
    """All fields, each against the size of what it is made of: P and s against max|M|."""
    size = np.abs(expected["M"]).max()
    for name, value in expected.items():
        got = getattr(found, name)
        assert got.shape == value.shape and got.dtype == np.float64, name
        scale = size if name in ("M", "P", "P_se", "s", "s_se", "replicates") else np.abs(value).max()
        assert np.abs(got - value).max() <= tolerance * scale, name
