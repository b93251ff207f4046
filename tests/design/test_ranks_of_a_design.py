"""A design on several ranks: cells are dealt, and what chooses the proxy is one number for all."""

import types

import ranks
import torch
from proxies import run_of

from megatron_commute.design import cells, cost


def dealt_on(rank, folder):
    """What rank sees after four cells were dealt to it and another; which of them it worked on."""
    said = []
    jobs = [(f"{n}", squared, {"n": n}) for n in range(4)]
    found = cells.dealt(folder, None, jobs, 1, lambda cell: said.append(cell["key"]))
    return {key: cell["square"] for key, cell in found.items()}, said


def squared(settings, folder, n):
    return {"square": n * n}


def test_ranks_share_the_cells_and_all_see_them(tmp_path):
    (one, said), (other, theirs) = ranks.run(dealt_on, 2, tmp_path / "work")
    assert one == other == {"0": 0, "1": 1, "2": 4, "3": 9}
    assert (said, theirs) == (["0", "2"], ["1", "3"])
    torn = tmp_path / "work" / "cells.jsonl.1"
    torn.write_text(torn.read_text()[:-20])  # killed while it wrote cell 3
    assert [said for _, said in ranks.run(dealt_on, 2, tmp_path / "work")] == [["3"], []]
    assert cells.read(tmp_path / "work").keys() == {"0", "1", "2", "3"}


def timed(rank):
    """A step's time as every rank is told it; ranks measure their own."""
    proxy = run_of(dtype=torch.float32).proxy
    return cost.measured_step(types.SimpleNamespace(proxy=proxy))


def test_ranks_agree_on_the_time_of_a_step():
    first, second = ranks.run(timed, 2)
    assert first == second > 0
