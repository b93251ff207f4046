"""Batches: Megatron's slices at every layout, prefetching workers, the order of epochs, resume."""

import json
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from megatron_commute.data.sampler import MixedDataset, MixtureSampler, item, items, permuted
from megatron_commute.mixture import Mixture


def stream_of(weights=(5, 3, 2), **limits):
    return Mixture(np.array(weights, dtype=float), **limits)


def wanted(n, changes=(), **limits):
    """The first n (domain, position) pairs, one by one."""
    stream = stream_of(**limits)
    for at, weights in changes:
        stream.schedule(weights, at)
    domain, position = stream.take(n)
    return list(zip(domain.tolist(), position.tolist(), strict=True))


def sampler_of(mixture, micro_batch, rank, size, global_batch, stop_sample):
    return MixtureSampler(
        mixture=mixture,
        micro_batch=micro_batch,
        data_parallel_rank=rank,
        data_parallel_size=size,
        global_batch=global_batch,
        stop_sample=stop_sample,
    )


def megatron_slices(samples, micro_batch, rank, size):
    """Megatron's MegatronPretrainingSampler.__iter__, over any list."""
    batch, found = [], []
    for sample in samples:
        batch.append(sample)
        if len(batch) == micro_batch * size:
            found.append(batch[rank * micro_batch : (rank + 1) * micro_batch])
            batch = []
    return found


@pytest.mark.parametrize("micro_batch,size", [(1, 1), (2, 1), (1, 4), (3, 2), (4, 4)])
def test_slices_are_megatrons_on_every_rank(micro_batch, size):
    samples = wanted(100)
    for rank in range(size):
        sampler = sampler_of(stream_of(), micro_batch, rank, size, 48, 100)
        want = megatron_slices(samples, micro_batch, rank, size)
        assert len(sampler) == len(want)
        assert list(sampler) == want
        assert len(sampler) == 0


def global_batches(stream, sizes, steps, global_batch=16, micro_batch=2):
    """Samples of each step, pooled over ranks, when the data-parallel size is sizes[i] for steps[i] steps."""
    found = []
    for size, count in zip(sizes, steps, strict=True):
        ranks = [iter(sampler_of(stream, micro_batch, rank, size, global_batch, 640)) for rank in range(size)]
        for _ in range(count):
            micro = [[next(rank) for rank in ranks] for _ in range(global_batch // (micro_batch * size))]
            found.append([sample for chunk in micro for part in chunk for sample in part])
        stream = Mixture.from_state(json.loads(json.dumps(stream.state_dict())))
        stream.take(count * global_batch)
    return found


def test_data_parallel_size_changes_within_a_run():
    stream = stream_of(budgets=[100, 300, None], samples=640)
    stream.schedule([1, 1, 1], 160)
    elastic = global_batches(stream, [1, 2, 4, 1], [7, 9, 11, 13])
    flat = [sample for batch in elastic for sample in batch]
    assert flat == wanted(640, [(160, [1, 1, 1])], budgets=[100, 300, None], samples=640)
    assert elastic == global_batches(stream, [8], [40])


class Numbers:
    """A one-epoch data set whose items tell where they came from."""

    def __init__(self, domain, size):
        self.domain, self.size = domain, size

    def __len__(self):
        return self.size

    def __getitem__(self, k):
        if not 0 <= k < self.size:
            raise IndexError(k)
        return {"text": np.array([self.domain, k])}


WORKERS = [(0, None, False), (1, 1, True), (1, 7, False), (2, 2, True), (3, 4, True), (8, 2, False)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("workers,factor,persistent", WORKERS)
def test_weights_change_on_time_under_prefetching(workers, factor, persistent):
    """Each step begins with a change scheduled `lead` ahead; every batch must obey, none late, none early."""
    micro_batch, size, global_batch, steps = 2, 2, 8, 12
    chunk = micro_batch * size
    lead = ((factor or 0) * workers + 1) * chunk
    lead = -(-lead // global_batch) * global_batch
    sampler = sampler_of(stream_of(), micro_batch, 1, size, global_batch, steps * global_batch)
    data = MixedDataset([Numbers(d, 11 + d) for d in range(3)], seed=5)
    options = {"prefetch_factor": factor, "persistent_workers": persistent} if workers else {}
    loader = iter(DataLoader(data, batch_sampler=sampler, num_workers=workers, **options))
    consumed, changes, got = 0, [], []
    for step in range(steps):
        weights = np.random.default_rng(step).dirichlet(np.ones(3))
        sampler.schedule(weights, consumed + lead)
        changes.append((consumed + lead, weights))
        got += [next(loader) for _ in range(global_batch // chunk)]
        consumed += global_batch
    keys = [list(zip(batch["domain"].tolist(), batch["position"].tolist(), strict=True)) for batch in got]
    assert keys == megatron_slices(wanted(consumed, changes), micro_batch, 1, size)
    for batch in got:
        for (domain, number), d, p in zip(
            batch["text"].tolist(), batch["domain"], batch["position"], strict=True
        ):
            assert (domain, number) == (d, item(int(p), 11 + int(d), 5, int(d)))


def test_a_change_behind_the_frontier_is_refused():
    sampler = sampler_of(stream_of(), 2, 0, 2, 8, 100)
    batches = iter(sampler)
    next(batches), next(batches)
    with pytest.raises(
        ValueError, match=r"schedule at 8 or later .with prefetching workers, use a longer `lead`"
    ):
        sampler.schedule([1, 1, 1], 7)
    sampler.schedule([0, 0, 1], 8)
    assert {d for d, _ in next(batches)} == {2}


def test_sampler_runs_on_its_own_copy_from_where_the_mixture_stands():
    stream = stream_of()
    stream.take(24)
    sampler = sampler_of(stream, 4, 0, 1, 8, 48)
    assert [pair for batch in sampler for pair in batch] == wanted(48)[24:]
    assert stream.index == 24 and sampler.frontier.index == 48


def test_wrong_layouts_name_the_cure():
    with pytest.raises(ValueError, match="give a rank below the data-parallel size"):
        sampler_of(stream_of(), 2, 2, 2, 8, 100)
    for batch in (0, 6, 12):
        with pytest.raises(ValueError, match=f"global batch {batch} is not a multiple of .* = 8: change one"):
            sampler_of(stream_of(), 4, 0, 2, batch, 48)
    with pytest.raises(ValueError, match="lower it"):
        sampler_of(stream_of(budgets=[5, 5, 5]), 1, 0, 1, 1, 16)
    with pytest.raises(ValueError, match="give it data"):
        MixedDataset([Numbers(0, 3), Numbers(1, 0)], seed=1)
    with pytest.raises(TypeError, match="wrap its items as dicts"):
        MixedDataset([[1, 2, 3]], seed=1)[0, 0]
    with pytest.raises(IndexError, match="2 domains"):
        MixedDataset([[1], [2]], seed=1)[2, 0]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection_and_the_integer_path_agrees(size):
    for seed, domain, epoch in [(0, 0, 0), (-3, 1, 2), (2**70, 5, 10**12)]:
        order = permuted(seed, domain, epoch, np.arange(size), size)
        assert sorted(order.tolist()) == list(range(size))
        first = epoch * size
        assert [item(first + k, size, seed, domain) for k in range(size)] == order.tolist()


def test_permutation_is_frozen():
    """Other numbers here mean that every run under way would repeat samples after an upgrade."""
    assert permuted(1234, 2, 1, np.arange(8), 8).tolist() == [6, 3, 4, 1, 5, 7, 0, 2]
    assert permuted(7, 0, 3, np.array([0, 1, 10**12]), 10**12 + 39).tolist() == [
        409199861689,
        483188571745,
        178635767713,
    ]


@pytest.mark.parametrize("size", [2, 5, 37])
def test_every_item_comes_anywhere_equally_often(size):
    """Chi-square of (offset, item) over 4000 epochs, and of neighbouring items."""
    epochs = 4000
    offset = np.tile(np.arange(size), epochs)
    order = permuted(3, 1, np.repeat(np.arange(epochs), size), offset, size).reshape(epochs, size)
    counts = np.array([np.bincount(order[:, k], minlength=size) for k in range(size)])
    freedom = (size - 1) ** 2
    statistic = ((counts - epochs / size) ** 2 / (epochs / size)).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    if size > 2:
        steps = np.bincount(((order[:, 1:] - order[:, :-1]) % size).ravel(), minlength=size)[1:]
        expected = epochs * (size - 1) / (size - 1)
        assert ((steps - expected) ** 2 / expected).sum() < size - 2 + 6 * np.sqrt(2 * size)


def test_positions_past_the_end_begin_a_fresh_epoch_and_use_every_item():
    epoch, number = items(np.arange(50), 20, seed=9, domain=3)
    assert epoch.tolist() == [0] * 20 + [1] * 20 + [2] * 10
    assert Counter(number[:20].tolist()) == Counter(number[20:40].tolist()) == Counter(range(20))
    assert number[:20].tolist() != number[20:40].tolist()
    data = MixedDataset([Numbers(0, 20)], seed=9)
    assert len(data) == 20 and data[0, 45]["position"].dtype == np.int64
    with pytest.raises(ValueError, match="reduce positions modulo"):
        permuted(0, 0, 0, np.array([20]), 20)
    with pytest.raises(ValueError, match="count up from 0"):
        items(np.array([-1]), 20, 0, 0)


def test_keys_keep_the_order_of_a_domain_that_moved_in_the_file():
    both = MixedDataset([Numbers(0, 30), Numbers(1, 30)], seed=4)
    moved = MixedDataset([Numbers(1, 30)], seed=4, keys=[1])
    for p in range(40):
        assert both[1, p]["text"].tolist() == moved[0, p]["text"].tolist()
