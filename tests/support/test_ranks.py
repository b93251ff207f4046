"""The runner of gloo ranks: results in order, the first failure's traceback, the stacks of what hangs."""

import os
import signal
import time

import pytest
import ranks
import torch


def add(rank, value):
    total = torch.tensor([rank + value])
    torch.distributed.all_reduce(total)
    return rank, total


def fail(rank):
    if rank == 1:
        raise ValueError("rank one is ill")
    torch.distributed.barrier()


def hang(rank):
    if rank == 1:
        time.sleep(100)


def die(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.barrier()


def leave(rank):
    if rank == 0:
        raise SystemExit(3)
    torch.distributed.barrier()


def test_results_come_in_rank_order():
    assert ranks.run(add, 2, 1.0) == [(0, torch.tensor([3.0])), (1, torch.tensor([3.0]))]


def test_the_traceback_of_a_rank_is_shown():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: rank one is ill"):
        ranks.run(fail, 2)
    with pytest.raises(RuntimeError, match="SystemExit"):
        ranks.run(leave, 2)


def test_a_killed_rank_is_named():
    with pytest.raises(RuntimeError, match="rank 1 died without a word"):
        ranks.run(die, 2)


def test_a_hang_ends_and_shows_where():
    with pytest.raises(RuntimeError, match=r"rank 1:(.|\n)*in hang"):
        ranks.run(hang, 2, timeout=3.0)
