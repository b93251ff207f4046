"""ZeRO-3 with partitioned parameters: a probe measures what one process does, and leaves training bit for bit alone."""

import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute import probe, reduce
from megatron_commute.adapters import torch_loop, zero3


def everyone():
    return reduce.Groups(reduce.everyone(), None, reduce.everyone())


def probed(engine, how=None, draw=stacks.draw, loss=stacks.loss, model=None, limit=None):
    groups, how = everyone(), how or stacks.settings()
    model = model or zero3.probe_model(engine, loss, 2)
    team = probe.team(model, groups, how.splits, how.memory)
    return probe.measure(model, groups, team, draw, how, stacks.TARGET, stacks.WEIGHTS, stacks.FLOW, limit)


def measures(rank, size):
    stacks.start()
    engine = stacks.zero3_engine(size)
    return {"plain": probed(engine)}
