"""A step without a probe, log line or checkpoint sends nothing and waits for no device."""

import functools

import counting
import numpy as np
import ranks
import torch
from plain_loop import BATCH, LENGTH, Loop

from megatron_commute import reduce
from megatron_commute.adapters.megatron_deepspeed.sight import Sight


def groups():
    world = reduce.everyone()
    return reduce.Groups(data=world, model=None, world=world)


def step(loop, sight, number):
    """One step of a host: its loader's batch on the host, its losses as a tensor that a GPU would hold."""
    loop.hook.begin(number)
    count = len(loop.hook.tally.mine)
    domains, positions = (
        torch.from_numpy(x[loop.hook.tally.mine]) for x in (loop.hook.domains, loop.hook.positions)
    )
    text = torch.ones(count, LENGTH + 1, dtype=torch.int64)
    losses = torch.full((count, LENGTH), 2.0)

    def forward_step(batches, model):
        next(batches)
        return losses, functools.partial(lambda mask, _, output: output.mean(), torch.ones(count, LENGTH), 0)

    sight.begin()
    batches = sight.over(iter([{"text": text, "domain": domains, "position": positions}]))
    sight.forward_step(forward_step)(batches, None)
    with counting.reads(lambda tensor: tensor.is_floating_point()) as read:
        loop.hook.end(sight.sequence_losses(count), sight.tokens(count), sight.delivered())
    return read


def counted(rank, folder):
    """(collectives, reads) of every step, then of a log line, a checkpoint, and a second one after it."""
    import pathlib

    loop, sight, told = Loop(pathlib.Path(folder), steps=30, groups=groups(), every=20), Sight(True, True), []
    for number in range(9):
        with counting.collectives() as sent:
            read = step(loop, sight, number)
        told.append((len(sent), len(read)))
    for action in (lambda: loop.hook.log_losses(9), loop.hook.state_dict):
        with counting.collectives() as sent, counting.reads() as read:
            action()
        told.append((len(sent), len(read) > 0))
    with counting.collectives() as sent:
        step(loop, sight, 9)
        loop.hook.state_dict()
        loop.hook.state_dict()
    told.append(sent)
    return told


def test_off_interval_a_step_makes_no_collective_and_reads_no_device(tmp_path):
    """The first step looks at the control file, as does the first after a log line."""
    for told in ranks.run(counted, 2, str(tmp_path)):
        assert told[0] == (1, 0) and told[1:9] == [(0, 0)] * 8
        assert told[9] == (1, True)  # the log line: one message
        assert told[10] == (0, False)  # a checkpoint right after it has nothing to bring together
        assert told[11] == ["broadcast", "all_reduce"]  # the control file; what the checkpoint needs, once


def test_losses_on_a_device_reach_the_record(tmp_path):
    loop, sight = Loop(tmp_path, steps=30, every=20), Sight(True, True)
    for number in range(3):
        step(loop, sight, number)
    assert loop.hook.log_losses(3) == dict.fromkeys(loop.plan.names, 2.0)
    assert loop.hook.steering.losses[:, 1].sum() == 3 * BATCH
    np.testing.assert_array_equal(loop.hook.steering.losses[:, 0], 2.0 * loop.hook.steering.losses[:, 1])
