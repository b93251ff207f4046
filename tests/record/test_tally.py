"""What training has seen: independent of layout and order, exact through a checkpoint."""

import json

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_commute import reduce
from megatron_commute.record import tally as module
from megatron_commute.record.tally import Tally, sample_hashes

M64 = 2**64

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
    tally.settle()


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


def mixed(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) in plain integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % M64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % M64
    return x ^ (x >> 31)


def hashed(index, domain, position, tokens):
    """A sample's hash by its definition, one number after the other."""
    factors = [mixed((i + 1) * 0x9E3779B97F4A7C15 % M64) | 1 for i in range(max(3, len(tokens)))]
    content = sum(f * int(t) for f, t in zip(factors, tokens, strict=False)) % M64
    place = sum(f * int(part) for f, part in zip(factors, (index, domain, position), strict=False))
    return mixed((mixed(content) + place) % M64)


def test_the_fingerprint_is_the_sum_of_the_samples_in_any_order():
    total = 0
    for step in reversed(range(STEPS)):
        domains, positions, _, tokens = stream(step)
        for i in reversed(range(BATCH)):
            total += hashed(step * BATCH + i, domains[i], positions[i], tokens[i])
    assert alone().fingerprint == total % 2**64 == alone(micro=4).fingerprint


def test_the_hash_tells_place_origin_and_content_apart():
    rows = [
        (5, 1, 17, np.arange(4)),
        (6, 1, 17, np.arange(4)),
        (5, 2, 17, np.arange(4)),
        (5, 1, 18, np.arange(4)),
    ]
    rows += [(5, 1, 17, np.arange(1, 5)), (5, 1, 17, np.arange(4)[::-1]), (1, 5, 17, np.arange(4))]
    index, domain, position, tokens = (np.array(part) for part in zip(*rows, strict=True))
    found = sample_hashes(index, domain, position, tokens)
    assert len(set(found.tolist())) == len(rows)
    assert (sample_hashes(index, domain, position, tokens.astype(np.uint16)) == found).all()


@pytest.mark.skipif(module.compiled is None, reason="installed without a C++ compiler")
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 11)), min_size=1, max_size=4), st.integers(0, 2**32)
)
@settings(deadline=None)
def test_the_compiled_sum_is_that_of_the_samples(shapes, seed):
    rng, rows = np.random.default_rng(seed), sum(rows for rows, _ in shapes)
    index, domain, position = rng.integers(-(2**63), 2**63 - 1, size=(3, rows))
    parts = [rng.integers(-(2**31), 2**31, size=shape).astype(rng.choice(["<i8", "<i4"])) for shape in shapes]
    expected = 0
    for at, tokens in enumerate(row for part in parts for row in part):
        expected += hashed(*(int(part[at]) for part in (index, domain, position)), tokens)
    found = module.sum_of_hashes(index, domain, position, parts)
    plain = [sample_hashes(*(x[:0] for x in (index, domain, position)), np.zeros((0, 1)))]
    begin = 0
    for part in parts:
        own = slice(begin, begin + len(part))
        plain.append(sample_hashes(index[own], domain[own], position[own], part))
        begin += len(part)
    assert int(found) == expected % 2**64 == sum(map(int, np.concatenate(plain))) % 2**64


@pytest.mark.skipif(module.compiled is None, reason="installed without a C++ compiler")
def test_the_compiled_sum_refuses_arrays_it_would_misread():
    place, tokens, factors = np.arange(4), np.zeros((4, 8), dtype=np.int64), module._factors(8)
    good = [place, place, place, [tokens], factors]
    assert module.compiled(*good) == int(sample_hashes(place, place, place, tokens).sum())
    for at, bad in [
        (0, place[:3]),
        (2, place[:, None]),
        (3, [tokens[0]]),
        (3, [tokens] * 2),
        (4, factors[:7]),
    ]:
        with pytest.raises(ValueError, match="give"):
            module.compiled(*(bad if k == at else value for k, value in enumerate(good)))
    with pytest.raises(TypeError):
        module.compiled(*good[:4], factors.astype(np.float64))


def test_one_token_of_a_million_changes_the_fingerprint():
    tokens = np.random.default_rng(0).integers(50000, size=(64, 128))
    place = np.arange(64)
    sums = {int(sample_hashes(place, place, place, tokens).sum())}
    for change in range(300):
        other = tokens.copy()
        other[change % 64, (7 * change) % 128] += 1 + change
        sums.add(int(sample_hashes(place, place, place, other).sum()))
    assert len(sums) == 301


def four_ranks(rank, cuts):
    """Losses that are no multiples of anything, settled at other steps."""
    tally = Tally(
        domains=K, global_batch=BATCH, micro_batch=1, data_rank=rank, data_size=4, group=reduce.everyone()
    )
    for step in range(STEPS):
        domains, positions, _, tokens = stream(step)
        losses = np.random.default_rng([step, 9]).exponential(3.0, size=BATCH)
        tally.add(step * BATCH, domains, positions, torch.from_numpy(losses[tally.mine]), tokens[tally.mine])
        if step in cuts:
            tally.settle()
    tally.settle()
    return tally.state_dict()


def test_where_it_is_settled_changes_no_bit():
    plain, cut = ranks.run(four_ranks, 4, ()), ranks.run(four_ranks, 4, (0, 1, 3))
    assert plain == cut and all(state == plain[0] for state in plain)
    expected = np.zeros(K)
    for step in range(STEPS):
        np.add.at(expected, stream(step)[0], np.random.default_rng([step, 9]).exponential(3.0, size=BATCH))
    np.testing.assert_allclose(np.array(plain[0]["losses"])[:, 0], expected, atol=STEPS * BATCH * 2.0**-33)


def test_steps_send_nothing_and_a_settled_tally_neither():
    """Of two ranks, one message for each time that something was noted."""
    assert ranks.run(messages, 2) == [[0, 1, 1]] * 2


def messages(rank):
    tally = Tally(
        domains=K, global_batch=BATCH, micro_batch=MICRO, data_rank=rank, data_size=2, group=reduce.everyone()
    )
    counts = []
    reduce.traffic.reset()
    for step in range(STEPS):
        domains, positions, losses, tokens = stream(step)
        tally.add(step * BATCH, domains, positions, losses[tally.mine], tokens[tally.mine])
    for settle in (lambda: None, tally.settle, tally.settle):
        settle()
        counts.append(sum(calls for calls, _ in reduce.traffic.by_kind.values()))
    return counts


def test_a_loss_that_is_not_finite_is_no_reason_to_stop():
    tally = Tally(domains=K, global_batch=2, micro_batch=1, data_rank=0, data_size=1, group=None)
    tally.add(
        0, np.array([0, 1]), np.array([0, 0]), np.array([np.nan, 2.0]), np.zeros((2, 3), dtype=np.int64)
    )
    tally.settle()
    means = tally.means()
    assert np.isnan(means[0]) and means[1:] == [2.0, None]
