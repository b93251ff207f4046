"""Collectives: what they compute, what they cost, how replicates are dealt to ranks, how ranks leave a section together."""

import numpy as np
import pytest
import ranks
import torch

from megatron_commute import reduce
from megatron_commute.reduce import Groups


def four_ranks(rank):
    """Everything that needs four ranks, in one launch."""
    world = reduce.everyone()
    groups, told = Groups(world, None, world), {}
    made = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    pair = made[rank // 2]
    reduce.traffic.reset()
    told["rank"] = (reduce.rank(), reduce.rank_in(pair), reduce.size(pair), groups.data_rank)
    told["sum"] = reduce.sum_of_numbers(np.array([[0.1 * rank, 1.0]]), world).tolist()
    told["max"] = reduce.max_of_numbers(np.array([rank, -rank], dtype=np.float64), world).tolist()
    told["vote"] = [
        reduce.any_rank(rank == 2, world),
        reduce.any_rank(False, world),
        reduce.any_rank(rank == 2, pair),
    ]
    told["broadcast"] = reduce.broadcast_numbers(np.array([np.nan, 1 / 3 + rank]), groups).tolist()
    text = "" if rank == 1 else f"rank {rank}: " + "ж" * 400
    told["text"] = reduce.gather_text(text, groups)
    told["kinds"] = dict(reduce.traffic.by_kind)
    told["vectors"] = vectors(rank, world)
    told["agreed"] = [agreed(rank, world, culprit) for culprit in (3, None)]
    told["teams"] = {splits: team(groups, splits) for splits in (1, 2, 3, 4, 6)}
    told["together"] = team(groups, 3, together=True)
    halves = Groups(
        pair, [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])][rank % 2], world
    )
    told["two replicas of two shards"] = team(halves, 1)
    return told


def vectors(rank, world):
    """Three tensors in buckets of at most 5 elements: sums in place, one call a bucket."""
    list_ = [torch.full((2, 2), float(rank)), torch.arange(3.0) * rank, torch.tensor([2.0**rank])]
    strided = torch.zeros(3, 2).T
    strided += rank
    reduce.traffic.reset()
    found = reduce.sum_of_vectors([*list_, strided], world, bucket=5)
    flat = [t.reshape(-1).tolist() for t in found]
    return flat, found[0] is list_[0], reduce.traffic.by_kind["vector"], scattered(rank, world)


def scattered(rank, world):
    return reduce.scattered_sum(torch.arange(8.0) * (rank + 1), world).tolist()


def agreed(rank, group, culprit):
    try:
        with reduce.agreed(group):
            if rank == culprit:
                raise KeyError("mine")
        return "left"
    except (KeyError, RuntimeError) as fault:
        return repr(fault)


def team(groups, splits, **more):
    made = reduce.team(groups, splits, **more)
    together = reduce.sum_of_numbers(np.array([1.0]), made.group)[0]
    return made.splits, made.rounds, made.rank, made.size, together


@pytest.fixture(scope="module")
def told():
    return ranks.run(four_ranks, 4, timeout=120)


def test_places(told):
    assert [t["rank"] for t in told] == [(0, 0, 2, 0), (1, 1, 2, 1), (2, 0, 2, 2), (3, 1, 2, 3)]


def test_numbers_are_float64_and_equal_on_all_ranks(told):
    for t in told:
        assert t["sum"][0] == pytest.approx([0.6, 4.0], abs=1e-15) and t["sum"] == told[0]["sum"]
        assert t["max"] == [3.0, 0.0]
        assert np.isnan(t["broadcast"][0]) and t["broadcast"][1] == 1 / 3, "the first rank's, to the last bit"


def test_a_vote_is_heard_in_its_group_alone(told):
    assert [t["vote"] for t in told] == [[True, False, False]] * 2 + [[True, False, True]] * 2


def test_texts_come_in_rank_order_and_are_cut_at_a_limit(told):
    for t in told:
        assert (
            t["text"][1] == "" and t["text"][2].startswith("rank 2: жж") and len(t["text"][3].encode()) <= 483
        )


def test_traffic_counts_calls_and_bytes(told):
    kinds = {"sum": (1, 16), "max": (4, 16 + 3 * 4), "broadcast": (1, 16), "text": (1, 480)}
    assert told[0]["kinds"] == kinds


def test_vectors_are_summed_in_place_in_buckets(told):
    for rank, t in enumerate(told):
        flat, in_place, traffic, piece = t["vectors"]
        assert flat == [[6.0] * 4, [0.0, 6.0, 12.0], [15.0], [6.0] * 6] and in_place
        assert traffic == (3, 4 * 14), "4, then 3 + 1, then 6 elements"
        assert piece == [10.0 * (2 * rank), 10.0 * (2 * rank + 1)]


def test_a_section_ends_on_all_ranks_alike(told):
    other = "RuntimeError('another rank of its group failed in this section')"
    assert [t["agreed"] for t in told] == [[other, "left"]] * 3 + [["KeyError('mine')", "left"]]


def test_replicates_are_dealt_to_single_ranks_or_to_teams(told):
    # (splits, rounds, rank in team, team size, ranks that its group reaches)
    assert [t["teams"][6] for t in told] == [((r, r + 4)[: 1 + (r < 2)], 2, 0, 1, 1) for r in range(4)]
    assert [t["teams"][4] for t in told] == [((r,), 1, 0, 1, 1) for r in range(4)]
    assert [t["teams"][3] for t in told] == [
        ((0,), 1, 0, 1, 1),
        ((1,), 1, 0, 1, 1),
        ((2,), 1, 0, 2, 2),
        ((2,), 1, 1, 2, 2),
    ]
    assert [t["teams"][2] for t in told] == [((r // 2,), 1, r % 2, 2, 2) for r in range(4)]
    assert [t["teams"][1] for t in told] == [((0,), 1, r, 4, 4) for r in range(4)]
    assert [t["together"] for t in told] == [((0, 1, 2), 3, r, 4, 4) for r in range(4)]
    assert [t["two replicas of two shards"] for t in told] == [((0,), 1, r % 2, 2, 2) for r in range(4)]


def test_one_process_without_a_group_is_the_identity():
    reduce.traffic.reset()
    alone, array = Groups(), np.array([1.0, np.nan])
    for found in (
        reduce.sum_of_numbers(array, None), reduce.max_of_numbers(array, None), reduce.broadcast_numbers(array, alone)
    ):  # fmt: skip
        np.testing.assert_array_equal(found, array)
        assert found is not array
    vector = [torch.ones(3)]
    assert (
        reduce.sum_of_vectors(vector, None) is vector
        and reduce.any_rank(1, None)
        and not reduce.any_rank("", None)
    )
    assert reduce.gather_text("x", alone) == ["x"]
    assert reduce.team(alone, 3) == reduce.Team(splits=(0, 1, 2), rounds=3, group=None, rank=0, size=1)
    assert reduce.scattered_sum(vector[0], None) is vector[0]
    with pytest.raises(KeyError), reduce.agreed(None):
        raise KeyError
    assert reduce.traffic.by_kind == {} and reduce.everyone() is None and reduce.rank() == 0
