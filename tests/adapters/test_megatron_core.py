"""Probes of a megatron-core GPTModel: tensor parallelism changes nothing but the last digits."""

import types
import warnings

import jobs
import numpy as np
import pytest
import ranks
import torch

from megatron_commute import config

SPLITS, SAMPLES = 2, 8
CASES = [("exact", "identity"), ("exact", "adam"), ("difference", "adam")]


def _draw(part, domain, numbers):
    """Sequences that depend on nothing but their number; the domains differ by a permutation of the vocabulary."""
    rows = []
    for number in numbers:
        rng = np.random.default_rng([int(number), domain, part == "gradient"])
        text = rng.integers(64, size=jobs.SEQUENCE + 1)
        rows.append(np.random.default_rng(domain).permutation(jobs.VOCABULARY)[text])
    return torch.from_numpy(np.array(rows))


def _measured(rank, tensor_parallel):
    """{case: (M, P, score, score_se)} of a GPT after two steps of AdamW, and the names of what is counted once."""
    warnings.simplefilter("ignore")
    from megatron_commute import reduce
    from megatron_commute.adapters import megatron_core
    from megatron_commute.measure import probe

    args = jobs.trainer().parse(jobs.flags("unused", "--hidden-dropout", 0, "--attention-dropout", 0))
    args.tensor_model_parallel_size = tensor_parallel
    megatron_core.initialise(tensor_parallel, args.seed)
    model = megatron_core.gpt_model(args, jobs.VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        megatron_core.mean_loss(model, _draw("training", step, range(4))).backward()
        optimizer.step()
    engine = types.SimpleNamespace(module=model, optimizer=optimizer, zero_optimization_stage=lambda: 0)
    groups = megatron_core.groups()
    team = reduce.team(groups, SPLITS)
    weights = np.array([0.5, 0.3, 0.2])
    found = {}
    for method, metric in CASES:
        settings = config.Probe(samples=SAMPLES, splits=SPLITS, method=method, metric=metric, memory="full")
        judged = megatron_core.probe_model(engine, 2, method)
        one = probe.measure(judged, groups, team, _draw, settings, weights[None], weights, (0.01, (1.0, 0.9)))
        found[method, metric] = one.M[0], one.P[0], one.score[0], one.score_se[0]
    return found, sum(p.numel() for p, owned in zip(judged.parameters(), judged.owned, strict=True) if owned)


@pytest.fixture(scope="module")
def told():
    """What one process found, and what each of two tensor-parallel ranks found."""
    return ranks.run(_measured, 1, 1, timeout=150)[0], ranks.run(_measured, 2, 2, timeout=150)


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_ranks_measure_what_one_process_does(told, case):
    """Float32 models: 1e-6 of max|M| where products are exact, 1e-4 where they are differences."""
    (alone, _), pair = told
    limit = 1e-6 if case[0] == "exact" else 1e-4
    scale = np.abs(alone[case][0]).max()
    for found, _ in pair:
        for one, two in zip(alone[case], found[case], strict=True):
            assert np.abs(one - two).max() <= limit * scale
    assert scale > 0 and np.abs(alone[case][1]).max() > 1e-3 * scale


def test_every_parameter_is_counted_once(told):
    (_, whole), pair = told
    assert sum(counted for _, counted in pair) == whole
