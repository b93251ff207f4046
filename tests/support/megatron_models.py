"""GPTs of megatron-core for tests of their second derivatives: model, loss, direction, truth and probe."""

import math
import types
import warnings

import jobs
import numpy as np
import oracles
import pytest
import torch

from megatron_commute import config, ops, reduce
from megatron_commute.adapters.twice_differentiable import twice_differentiable
from megatron_commute.measure import probe

HEADS, WIDTH, LAYERS, LENGTH, VOCABULARY = 4, 16, 2, 8, 32


def megatron_gpt(tensor_parallel=1, dtype=torch.float64, **options):
    """A megatron-core GPTModel on this rank of a gloo group, at weights of an ordinary spread, equal in
    every layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        from megatron_commute.adapters.megatron_core import on_cpu

        on_cpu()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        torch.manual_seed(0)
        plain = (
            "gradient_accumulation_fusion",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "bias_activation_fusion",
        )
        config = TransformerConfig(
            num_layers=LAYERS,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            tensor_model_parallel_size=tensor_parallel,
            use_cpu_initialization=True,
            init_method_std=0.2,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            **(dict.fromkeys(plain, False) | options),
        )
        model = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization=config.normalization),
            VOCABULARY,
            LENGTH,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope" if config.gated_linear_unit else "learned_absolute",
        )
    return model.to(dtype)


def megatron_loss(model, tokens, labels):
    """Mean loss of a GPTModel as a callable of a list of parameters, in the order of
    model.named_parameters()."""
    names = [n for n, _ in model.named_parameters()]
    positions = torch.arange(LENGTH).expand_as(tokens)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)

    def loss(params):
        state = dict(zip(names, params, strict=True))
        return torch.func.functional_call(model, state, (tokens, positions, mask), {"labels": labels}).mean()

    return loss


def direction(model, seed=3):
    """A random vector that is the same in every layout: drawn whole, then cut as megatron cuts the
    parameter."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    generator = torch.Generator().manual_seed(seed)
    vector = []
    for name, p in model.named_parameters():
        dim = oracles.split_dimension(name)
        shape = [n * (size if i == dim else 1) for i, n in enumerate(p.shape)]
        whole = torch.randn(shape, generator=generator, dtype=torch.float64)
        vector.append((whole if dim is None else whole.chunk(size, dim)[rank]).to(p))
    return vector


def square(model, size):
    """Squared length over tensor-parallel ranks, parameters that every rank holds counted once."""
    group = torch.distributed.group.WORLD if size > 1 else None
    whole = [oracles.split_dimension(n) is None for n, _ in model.named_parameters()]

    def of(vector):
        split = sum(float(ops.gram([[t]], [[t]])) for t, w in zip(vector, whole, strict=True) if not w)
        rest = sum(float(ops.gram([[t]], [[t]])) for t, w in zip(vector, whole, strict=True) if w)
        return float(reduce.all_reduce_sum(torch.tensor(split, dtype=torch.float64), group)) + rest

    return of


def raw_product(loss, params, v):
    """Double backward as anybody would write it, without the refusals of hvp."""
    leaves = [p.detach().requires_grad_(True) for p in params]
    slopes = torch.autograd.grad(loss(leaves), leaves, create_graph=True)
    return torch.autograd.grad(slopes, leaves, v, materialize_grads=True)


def message(error, function, *args, **kwargs):
    """The text of the error that the function must raise."""
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    return str(raised.value)


LLAMA = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "num_query_groups": 2,
}


def whole(answers, key):
    """A vector of the model, merged from its shards, by name."""
    return {n: oracles.merge(n, [a[key][n] for a in answers], HEADS) for n in answers[0][key]}


def gap(a, b):
    """|a - b| / |b| of two vectors by name."""
    names = list(b)
    return math.sqrt(sum((a[n].double() - b[n].double()).square().sum() for n in names)) / math.sqrt(
        sum(b[n].double().square().sum() for n in names)
    )


def truth(shards, gelu="none", samples=4, dtype=torch.float64):
    """H v of the plain GPT with the weights of the megatron model, under megatron's names, by double backward in dtype."""
    plain = oracles.gpt_from_megatron([a["params"] for a in shards], HEADS, gelu).to(dtype)
    loss = oracles.language_loss(plain, *oracles.batch(VOCABULARY, samples, LENGTH))
    names, params = oracles.parameters(plain)
    v = {oracles.plain_name(n): t.to(dtype) for n, t in whole(shards, "v").items()}
    product = dict(zip(names, raw_product(loss, params, [v[n] for n in names]), strict=True))
    return {n: product[oracles.plain_name(n)] for n in shards[0]["v"]}


def sequences(part, domain, numbers):
    """Sequences that depend on nothing but their number; the domains differ by a permutation of the vocabulary."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([int(number), domain, part == "gradient"])
        text = rng.integers(64, size=jobs.SEQUENCE + 1)
        rows.append(np.random.default_rng(domain).permutation(jobs.VOCABULARY)[text])
    return torch.from_numpy(np.array(rows))


def probed(rank, tensor_parallel, cases):
    """{case: (M, P, score, score_se)} of a GPT after two steps of AdamW in float64, and how many numbers this rank owns.

    cases: (method, metric, dtype). A large eps keeps the steps smooth, so that layouts differ by rounding alone.
    """
    warnings.simplefilter("ignore")
    from megatron_commute.adapters import megatron_core

    args = jobs.trainer().parse(jobs.flags("unused", "--hidden-dropout", 0, "--attention-dropout", 0))
    args.tensor_model_parallel_size = tensor_parallel
    megatron_core.initialise(tensor_parallel, args.seed)
    model = megatron_core.gpt_model(args, jobs.VOCABULARY).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        with twice_differentiable(model):  # megatron-core's own cross-entropy rounds to float32
            megatron_core.mean_loss(model, sequences("training", step, range(4))).backward()
        optimizer.step()
    engine = types.SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    groups, weights, found = megatron_core.groups(), np.array([0.5, 0.3, 0.2]), {}
    team = reduce.team(groups, 2)
    for method, metric, dtype in cases:
        model.to(dtype)
        settings = config.Probe(samples=8, splits=2, method=method, metric=metric, memory="full")
        judged = megatron_core.probe_model(engine, 2, method)
        one = probe.measure(
            judged, groups, team, sequences, settings, weights[None], weights, (0.01, (1.0, 0.9))
        )
        found[method, metric, dtype] = one.M[0], one.P[0], one.score[0], one.score_se[0]
    return found, sum(p.numel() for p, owned in zip(judged.parameters(), judged.owned, strict=True) if owned)
