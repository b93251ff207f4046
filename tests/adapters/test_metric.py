"""The metric of Adam where its moments are sums over ranks: a fault on one rank ends it on all."""

import ranks
import torch

from megatron_commute import reduce
from megatron_commute.adapters.metric import Summed, adam_metric


def worked(rank, faulty, late):
    """What rank is told when rank 1 fails at the second of three moments, before or after its sum."""
    group = reduce.everyone()

    def moments():
        for i in range(3):
            with reduce.agreed(group):
                if faulty and rank == 1 and i == 1 and not late:
                    raise MemoryError("no room for it")
            found = reduce.sum_of_vectors([torch.full((2,), 1.0 + i + rank)], group)[0]
            yield _Unreadable() if faulty and rank == 1 and i == 1 and late else found

    try:
        return [d.tolist() for d in adam_metric(lambda: Summed(moments(), group), (True,) * 3, group)]
    except (MemoryError, RuntimeError) as fault:
        return type(fault).__name__


class _Unreadable:
    """A tensor of which no root can be taken."""

    def float(self):
        raise MemoryError("no room for its root")


def test_moments_that_are_sums_give_the_metric_of_the_sums():
    one, other = ranks.run(worked, 2, False, False)
    roots = torch.tensor([3.0, 5.0, 7.0]).sqrt()
    expected = 1 / (roots + 0.1 * roots.mean())
    assert one == other
    torch.testing.assert_close(torch.tensor(one), expected[:, None].expand(3, 2))


def test_a_fault_at_one_moment_ends_it_on_all_ranks():
    for late in (False, True):
        assert ranks.run(worked, 2, True, late) == ["RuntimeError", "MemoryError"]
