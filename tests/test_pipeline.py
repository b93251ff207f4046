"""Pipelines: a probe by the engine's own schedule measures what one process does, and leaves training bit for bit alone."""

import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute import probe, reduce
from megatron_commute.adapters import pipeline, torch_loop


def probed(engine, how=None, draw=stacks.draw, model=None, limit=None):
    groups, how = pipeline.groups(engine), how or stacks.settings()
    model = model or pipeline.probe_model(engine, stacks.batch, 2)
    team = probe.team(model, groups, how.splits, how.memory)
    return probe.measure(model, groups, team, draw, how, stacks.TARGET, stacks.WEIGHTS, stacks.FLOW, limit)


def alone(dtype=torch.float32, method="difference", **more):
    """What one process measures on the whole model."""
    model = torch_loop.probe_model(stacks.Stack().to(dtype), stacks.loss, 2)
    how, groups = stacks.settings(method, **more), reduce.Groups()
    return probe.measure(
        model,
        groups,
        reduce.team(groups, how.splits),
        stacks.draw,
        how,
        stacks.TARGET,
        stacks.WEIGHTS,
        stacks.FLOW,
    )


def batches(engine, steps):
    """The engine's data: micro-batches of this data-parallel rank."""
    for number in range(100 * engine.grid.get_data_parallel_rank(), 10**9, 2):
        yield stacks.batch(stacks.draw("train", number % 3, [number, number + 1]))


def trained(engine, steps=3, between=lambda: None):
    feed, losses = batches(engine, steps), []
    for _ in range(steps):
        losses.append(float(engine.train_batch(feed)))
        between()
    return losses


def measures(rank):
    stacks.start()
    found = {}
    for stages, data in ((2, 2), (4, 1)) if reduce.size(reduce.everyone()) == 4 else ((2, 1),):
        engine = stacks.pipeline_engine(stages, data)
        found[stages, data] = probed(engine)
    return found
