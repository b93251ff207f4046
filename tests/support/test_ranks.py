"""The runner of gloo ranks: results in order, the first failure's traceback, the stacks of what hangs."""

import time

import pytest
import ranks
import torch


def fail(rank):
    if rank == 1:
        raise ValueError("rank one is ill")
    torch.distributed.barrier()


def hang(rank):
    if rank == 1:
        time.sleep(100)


def leave(rank):
    if rank == 0:
        raise SystemExit(3)
    torch.distributed.barrier()


def test_the_traceback_of_a_rank_is_shown():
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed:(.|\n)*ValueError: rank one is ill"):
        ranks.run(fail, 2)
    with pytest.raises(RuntimeError, match="SystemExit"):
        ranks.run(leave, 2)


def test_a_hang_ends_and_shows_where():
    with pytest.raises(RuntimeError, match=r"rank 1:(.|\n)*in hang"):
        ranks.run(hang, 2, timeout=3.0)
