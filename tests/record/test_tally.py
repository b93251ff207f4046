"""What training has seen: independent of layout and order, exact through a checkpoint."""

import json

import numpy as np
import ranks

from megatron_commute import reduce
from megatron_commute.record.tally import Tally, sample_hash

K, BATCH, MICRO, STEPS, LENGTH = 3, 8, 2, 5, 7


def stream(step):
    """domains, positions i64[BATCH], losses f64[BATCH], tokens i64[BATCH, LENGTH] of the global stream at a step."""
    rng = np.random.default_rng(step)
    return (
        rng.integers(K, size=BATCH),
        rng.integers(100, size=BATCH),
        rng.integers(1, 9, size=BATCH) / 4,  # sums of quarters are exact
        rng.integers(50000, size=(BATCH, LENGTH)),
    )


def feed(tally, steps, mine):
    for step in steps:
        domains, positions, losses, tokens = stream(step)
        tally.add(step * BATCH, domains, positions, losses[mine], tokens[mine])


def two_ranks(rank):
    tally = Tally(
        domains=K, global_batch=BATCH, micro_batch=MICRO, data_rank=rank, data_size=2, group=reduce.everyone()
    )
    feed(tally, range(STEPS), tally.mine)
    return tally.mine.tolist(), tally.state_dict(), tally.means()


def alone(steps=range(STEPS), micro=MICRO):
    tally = Tally(domains=K, global_batch=BATCH, micro_batch=micro, data_rank=0, data_size=1, group=None)
    feed(tally, steps, tally.mine)
    return tally


def test_two_ranks_hold_what_one_rank_holds():
    (mine0, state0, means0), (mine1, state1, means1) = ranks.run(two_ranks, 2, timeout=60)
    assert mine0 == [0, 1, 4, 5] and mine1 == [2, 3, 6, 7], "Megatron's slices of chunks of 2 x 2"
    one = alone()
    assert state0 == state1 == one.state_dict()
    assert means0 == means1 == one.means()


def test_means_are_those_of_each_domain_and_start_anew():
    tally = alone()
    sums, counts = np.zeros(K), np.zeros(K)
    for step in range(STEPS):
        domains, _, losses, _ = stream(step)
        for k, loss in zip(domains, losses, strict=True):
            sums[k] += loss
            counts[k] += 1
    assert tally.means() == (sums / counts).tolist()
    assert tally.means() == [None] * K
    feed(tally, [0], tally.mine)
    domains, _, losses, _ = stream(0)
    expected = [losses[domains == k].mean() if (domains == k).any() else None for k in range(K)]
    assert tally.means() == expected


def test_a_checkpoint_between_two_log_lines_changes_nothing():
    first = alone(range(2))
    kept = json.loads(json.dumps(first.state_dict()))
    second = alone(())
    second.load_state_dict(kept)
    feed(second, range(2, STEPS), second.mine)
    assert second.state_dict() == alone().state_dict() and second.means() == alone().means()


def test_the_fingerprint_is_the_sum_of_the_samples_in_any_order():
    total = 0
    for step in reversed(range(STEPS)):
        domains, positions, _, tokens = stream(step)
        for i in reversed(range(BATCH)):
            total += sample_hash(step * BATCH + i, domains[i], positions[i], tokens[i])
    assert alone().fingerprint == total % 2**64 == alone(micro=4).fingerprint


def test_the_hash_tells_place_origin_and_content_apart():
    base = (5, 1, 17, np.arange(4))
    others = [
        (6, 1, 17, np.arange(4)),
        (5, 2, 17, np.arange(4)),
        (5, 1, 18, np.arange(4)),
        (5, 1, 17, np.arange(1, 5)),
    ]
    assert len({sample_hash(*row) for row in [base, *others]}) == 5
    assert sample_hash(*base) == sample_hash(5, np.int64(1), np.int64(17), np.arange(4, dtype=np.int32))


def test_a_loss_that_is_not_finite_is_no_reason_to_stop():
    tally = Tally(domains=K, global_batch=2, micro_batch=1, data_rank=0, data_size=1, group=None)
    tally.add(
        0, np.array([0, 1]), np.array([0, 0]), np.array([np.nan, 2.0]), np.zeros((2, 3), dtype=np.int64)
    )
    means = tally.means()
    assert np.isnan(means[0]) and means[1:] == [2.0, None]
