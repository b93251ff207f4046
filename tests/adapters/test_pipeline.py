"""Pipelines: a probe by the engine's own schedule measures what one process does, and leaves training bit for bit alone."""

import itertools
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute.adapters import pipeline
from megatron_commute.measure import probe
from megatron_commute.settings import memory


def probed(engine, how=None, **more):
    return stacks.measured(
        pipeline.probe_model(engine, stacks.batch, 2), pipeline.groups(engine), how, **more
    )


def out_of_order(self, slot, send=pipeline._Run.send_forward):
    """What a stage sends on, under a wrong number on rank 1."""
    slot.number += 3 * (self.engine.global_rank == 1)
    send(self, slot)
    slot.number -= 3 * (self.engine.global_rank == 1)


# ranks 0 and 1 are the first stage of two replicas, ranks 2 and 3 the last
ORDER = {"order": "pipeline stages are out of order: message 0 was due from rank 1, 6 came"}


def faulty(engine, mode="full"):
    """A probe for stacks.survived, with a fault that only pipelines have."""

    def measured(kind, draw, limit):
        with (
            mock.patch.object(pipeline._Run, "send_forward", out_of_order)
            if kind == "order"
            else nullcontext()
        ):
            return probed(engine, stacks.settings(memory=mode), draw=draw, limit=limit)

    return measured


def batches(engine):
    """The engine's data: micro-batches of this data-parallel rank."""
    for number in range(100 * engine.grid.get_data_parallel_rank(), 10**9, 2):
        yield stacks.batch(stacks.draw("train", number % 3, [number, number + 1]))


def trained(engine, steps=3, between=lambda: None):
    torch.manual_seed(engine.global_rank)  # of dropout
    feed, losses = batches(engine), []
    for _ in range(steps):
        losses.append(float(engine.train_batch(feed)))
        between()
    return losses


def state(engine):
    """What training would go on from: weights, gradients, optimiser, counters, random numbers, flags."""
    tensors = [
        *engine.module.parameters(),
        *(p.grad for p in engine.module.parameters() if p.grad is not None),
    ]
    tensors += [t for s in engine.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    counters = (engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps)
    flags = [m.training for m in engine.module.modules()]
    buffers = {name: len(held) for name, held in engine.pipe_buffers.items()}
    return [t.detach().clone() for t in (*tensors, torch.get_rng_state())], (counters, flags, buffers)


def everything(rank):
    """On 4 ranks: two replicas of two stages, one of four, half precision, training with and without probes, faults."""
    stacks.start()
    told = {}
    engine = stacks.pipeline_engine(2, 2)
    for mode in memory.MODES:
        told["2x2", mode] = probed(engine, stacks.settings(memory=mode))
    told["faults in shards"] = stacks.survived(rank, engine, faulty(engine, "sharded"), state, ORDER)
    told["team"] = probed(engine, stacks.settings(splits=3, samples=9))
    told["alone"] = trained(stacks.pipeline_engine(2, 2))
    seen = []
    told["watched"] = trained(engine, between=lambda: seen.append(probed(engine).P))
    told["watching"] = seen[0]
    told["faults"] = stacks.survived(rank, engine, faulty(engine), state, ORDER)
    recomputing = [stacks.pipeline_engine(2, 2, checkpoint_interval=1) for _ in range(2)]
    told["checkpointing"] = probed(recomputing[0])
    told["recomputed"] = [
        trained(recomputing[0], 2, lambda: probed(recomputing[0])),
        trained(recomputing[1], 2),
    ]
    told["4x1"] = probed(stacks.pipeline_engine(4, 1))
    return told


def half(rank):
    """On 2 ranks: a pipeline whose weights are bf16, and refusals."""
    stacks.start()
    engine = stacks.pipeline_engine(2, 1, bf16=True)
    before = trained(engine, 1)
    found, after = probed(engine), state(engine)
    probed(engine)
    told = {"P": found.P, "M": found.M, "kept": stacks.same(after, state(engine)), "losses": before}
    told["weights"] = {n: p.detach().float() for n, p in engine.module.named_parameters()}
    try:
        probed(engine, stacks.settings("exact"))
    except probe.ProbeFailed as fault:
        told["exact"] = str(fault)
    engine.module.loss_fn = None
    try:
        pipeline.probe_model(engine, stacks.batch, 2)
    except ValueError as fault:
        told["loss"] = str(fault)
    return told


# Ranks 0 and 1 are the first stage of two replicas, ranks 2 and 3 the last.


@pytest.fixture(scope="module")
def run():
    return ranks.run(everything, 4, timeout=300)


def test_any_number_of_stages_and_replicas_measures_what_one_process_does(run):
    expected = stacks.alone()
    for told, case in itertools.product(run, (("2x2", "full"), ("2x2", "sharded"), "4x1", "checkpointing")):
        stacks.assert_close(told[case], expected)
    stacks.assert_close(run[0]["2x2", "scores"], expected, names=("s",))
    exact = stacks.alone(stacks.Stack().double(), method="exact")
    assert np.abs(expected.P - exact.P).max() <= 1e-3 * np.abs(exact.M).max()


def test_uneven_teams_measure_the_same(run):
    """Three splits of three sequences on two replicas."""
    how = {"splits": 3, "samples": 9}
    expected = stacks.alone(**how)
    for told in run:
        assert np.abs(told["team"].P - expected.P).max() <= 1e-4 * np.abs(expected.M).max()


def test_training_with_probes_is_training_without(run):
    """Three steps with clipping, dropout and two micro-batches; bit for bit, also under activation checkpointing."""
    for told in run:
        assert told["watched"] == told["alone"] and len(set(told["alone"])) == 3
        assert told["recomputed"][0] == told["recomputed"][1]
        np.testing.assert_array_equal(told["watching"], run[0]["watching"])
    assert np.abs(run[0]["watching"]).max() > 0


def test_a_fault_on_one_stage_is_told_by_all_and_leaves_no_trace(run):
    for mode in ("faults", "faults in shards"):
        stacks.assert_survived((told[mode] for told in run), ORDER)


def test_half_precision_is_measured_in_float32():
    told = ranks.run(half, 2, timeout=200)
    weights = told[1]["weights"] | told[0]["weights"]  # the last stage never uses its positions
    module = stacks.Stack()
    names = {"words": "tied_modules.words", "last": str(stacks.BLOCKS + 1)}
    names |= {f"blocks.{i}": str(i + 1) for i in range(stacks.BLOCKS)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            old = next(n for n in names if name.startswith(n + "."))
            p.copy_(weights[name.replace(old, names[old], 1)])
    expected = stacks.alone(module)
    size = np.abs(expected.M).max()
    for one in told:
        assert np.abs(one["P"] - expected.P).max() <= 1e-4 * size and one["kept"]
        assert (
            "method exact needs a model that one rank runs as a whole: write method difference"
            in one["exact"]
        )
        assert one["loss"] == "the PipelineModule has no loss_fn: give it one, as training needs it too"
