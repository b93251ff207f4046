"""A small language model as a stack of layers that DeepSpeed can cut into pipeline stages or shards, with tied words."""

import itertools
import os
import warnings

import numpy as np
import oracles
import pytest
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe
from megatron_commute.settings.values import Probe

VOCABULARY, LENGTH, WIDTH, BLOCKS = 24, 7, 12, 2
WEIGHTS, FLOW = np.array([0.5, 0.2, 0.3]), (0.1, (0.02, 0.01))
TARGET = np.array([[0.6, 0.4, 0.0]])
K = 3


def seeded(layer, seed):
    """Weights that depend on the seed alone, large enough for brackets of some size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.3 if p.dim() > 1 else noise * 0.1 + name.endswith("norm.weight"))
    return layer


class Words(torch.nn.Module):
    """Word and position embeddings; the words are the output layer's too."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(VOCABULARY, WIDTH))
        self.positions = torch.nn.Parameter(torch.empty(LENGTH, WIDTH))
        seeded(self, 1)

    def forward(self, inputs):
        tokens, mask = inputs
        return torch.nn.functional.embedding(tokens, self.weight) + self.positions, mask


class Block(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.norm, self.mixed = (
            torch.nn.LayerNorm(WIDTH, bias=False),
            torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False),
        )
        self.first, self.second = torch.nn.Linear(WIDTH, 17), torch.nn.Linear(17, WIDTH, bias=False)
        self.dropout = torch.nn.Dropout(0.1)
        seeded(self, seed)

    def forward(self, inputs):
        x, mask = inputs
        q, k, v = self.mixed(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2) / WIDTH**0.5).masked_fill(mask, float("-inf"))
        x = x + self.dropout(scores.softmax(-1) @ v)
        return x + self.dropout(self.second(torch.tanh(self.first(x)))), mask


class Last(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH, bias=False)
        seeded(self, 99)

    def forward(self, inputs):
        return self.norm(inputs[0])


def logits(words, x):
    return torch.nn.functional.linear(x, words.weight)


def cross_entropy(outputs, labels):
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())


def batch(tokens):
    """((tokens, mask), labels) of tokens i64[b, LENGTH + 1]."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return (tokens[:, :-1].contiguous(), mask), tokens[:, 1:].contiguous()


class Stack(torch.nn.Module):
    """The whole model in one process."""

    def __init__(self):
        super().__init__()
        self.words = Words()
        self.blocks = torch.nn.ModuleList([Block(10 + i) for i in range(BLOCKS)])
        self.last = Last()

    def forward(self, inputs):
        x = self.words(inputs)
        for block in self.blocks:
            x = block(x)
        return logits(self.words, self.last(x))


def loss(module, tokens):
    inputs, labels = batch(tokens)
    return cross_entropy(module(inputs), labels)


def draw(part, domain, numbers):
    return oracles.sequences(part, domain, numbers, VOCABULARY, LENGTH)


def settings(method="difference", metric="identity", memory="full", samples=6, splits=2, offload=False):
    how = {"samples": samples, "splits": splits, "method": method, "metric": metric}
    return Probe(**how, memory=memory, offload=offload)


def measured(model, groups, how=None, draw=draw, limit=None):
    """A probe of a model on the ranks of `groups`."""
    how = how or settings()
    team = reduce.team(groups, how.splits, together=how.memory == "sharded")
    return probe.measure(model, groups, team, draw, how, TARGET, WEIGHTS, FLOW, limit)


def alone(module=None, second_moments=None, decayed=None, **how):
    """What one process measures on the whole model."""
    model = torch_loop.probe_model(module or Stack(), loss, 2, second_moments, decayed=decayed)
    return measured(model, reduce.Groups(), settings(**how))


def start():
    """Let DeepSpeed work on CPU by gloo alone, in silence; on a gloo rank that is set up."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)


def config(ranks, accumulation=2, stage=0, bf16=False):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": 2 * accumulation * ranks,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.1)


def pipeline_engine(stages, data, accumulation=2, bf16=False, checkpoint_interval=0):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    words = {"key": "words", "typename": Words, "tied_weight_attr": "weight"}
    layers = [
        TiedLayerSpec(**words),
        *(LayerSpec(Block, 10 + i) for i in range(BLOCKS)),
        LayerSpec(Last),
        TiedLayerSpec(**words, forward_fn=logits),
    ]
    module = PipelineModule(
        layers,
        num_stages=stages,
        loss_fn=cross_entropy,
        partition_method="uniform",
        activation_checkpoint_interval=checkpoint_interval,
        activation_checkpoint_func=deepspeed.checkpointing.non_reentrant_checkpoint,
    )
    made = config(data, accumulation, stage=1 if bf16 else 0, bf16=bf16)
    return deepspeed.initialize(model=module, optimizer=optimizer(module), config=made)[0]


def zero3_engine(ranks, bf16=False):
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(ranks, stage=3, bf16=bf16), enabled=False):
        module = Stack()
    made = config(ranks, stage=3, bf16=bf16)
    return deepspeed.initialize(model=module, optimizer=optimizer(module), config=made)[0]


def same(one, two):
    """Whether two states of an engine, (tensors, the rest), are the same to the last bit: shards end in padding that nobody
    has written, which may be NaN.
    """
    bits = [[t.reshape(-1).view(torch.uint8) for t in tensors] for tensors in (one[0], two[0])]
    return one[1] == two[1] and all(torch.equal(a, b) for a, b in zip(*bits, strict=True))


def assert_close(found, expected, names=("M", "P", "s", "P_se")):
    """float32 differences: 1e-4 of max|M|, scores and what they are made of to a thousandth of their own size."""
    size = np.abs(expected.M).max()
    for name in names:
        assert np.abs(getattr(found, name) - getattr(expected, name)).max() <= 1e-4 * size, name
    assert found.step == pytest.approx(expected.step, rel=1e-5)
    for name in ("u_g", "h_theta", "score"):
        value = getattr(expected, name)
        assert np.abs(getattr(found, name) - value).max() <= 1e-3 * np.abs(value).max(), name


FAULTS = {
    "forward": "KeyError: 'a bug in a layer'",
    "memory": "OutOfMemoryError: CUDA out of memory",
    "backward": "ZeroDivisionError: division by zero",
    "nan": "FloatingPointError: the gradient is not finite",
    "data": "ValueError: token 99 is outside the vocabulary",
    "late": "TimeoutError: the probe ran past probe.time_limit",
}


def survived(rank, engine, probed, state, more=()):
    """{kind: what this rank was told, whether the engine's state stayed} when only rank 1 has a fault, and without any.

    probed(kind, draw, limit) measures; `more` kinds are its own.
    """
    told, forward = {}, Block.forward
    for kind in (*FAULTS, *more, "none"):

        def drawn(part, domain, numbers, kind=kind):
            if kind == "data" and rank == 1 and (part, domain) == ("gradient", 2):
                raise ValueError("token 99 is outside the vocabulary")
            return draw(part, domain, numbers)

        before, limit = state(engine), 0.0 if kind == "late" and rank == 1 else 1e9
        Block.forward = faulty(kind, rank, itertools.count())
        try:
            found = probed(kind, drawn, limit)
            told[kind] = "measured", bool(np.isfinite(found.P).all())
        except probe.ProbeFailed as fault:
            told[kind] = str(fault), same(before, state(engine))
        Block.forward = forward
    return told


def assert_survived(run, more=()):
    """Every rank was told of every fault, whose it was, and nothing was left of it."""
    for told in run:
        assert told.pop("none") == ("measured", True)
        for kind, (reason, kept) in told.items():
            assert {**FAULTS, **dict(more)}[kind] in reason and "rank " in reason and kept, (kind, reason)
        assert set(told) == {*FAULTS, *dict(more)}


def faulty(kind, rank, calls):
    """Block.forward with a fault of `kind` on rank 1 at the sixth of its `calls` (an itertools.count)."""
    forward = Block.forward

    def failing(self, inputs):
        x, mask = forward(self, inputs)
        if next(calls) == 5 and rank == 1:
            if kind == "forward":
                raise KeyError("a bug in a layer")
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if kind == "nan":
                x = x * float("nan")
            if kind == "backward":
                x.register_hook(lambda slope: 1 / 0)
        return x, mask

    return failing


def assert_traffic(traffic, again):
    """What a gradient on two ranks costs, collectives by kind as (count, bytes): each use of a parameter is gathered
    in forward and scattered in backward, `again` of each block are gathered once more where backward needs their
    values.
    """
    module = Stack()
    padded = sum(-(-p.numel() // 2) * 2 for p in module.parameters())
    uses = len(list(module.parameters())) + 1  # the words are used twice
    assert traffic["scatter"] == (uses, 4 * (padded + VOCABULARY * WIDTH))
    assert traffic["gather"][0] == uses + 1 + BLOCKS * again + 1
    assert traffic["max"][0] == traffic["gather"][0] + uses + 1  # a vote before each, one at the end
    assert set(traffic) == {"scatter", "gather", "max"}
