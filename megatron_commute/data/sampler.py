"""From a Mixture to batches: a batch sampler, and a data set keyed by (domain, position).

Position p of domain d stands for epoch p // n_d and item permuted(...)[p mod n_d] of a
one-epoch, unshuffled data set of n_d items. Budgets, weights and the run's length never enter
the permutation, so none of them can make a sample repeat within an epoch.
"""

from collections.abc import Iterator

import numpy as np

from megatron_commute.mixture import Mixture

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ROUNDS = 10


def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), for a Python int or a uint64 array."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def _keys(seed, domain, epoch):
    """One key for each round of the permutation; `epoch` is an int or a uint64 array."""
    base = _mix(epoch + _mix(_mix(seed & MASK) + domain + 1 & MASK) & MASK)
    return [_mix(base + (r * GOLDEN & MASK) & MASK) for r in range(1, ROUNDS + 1)]


def _network(x, keys, left_bits, right_bits):
    """An alternating Feistel network: a bijection of [0, 2^(left_bits + right_bits)) for any
    keys.
    """
    left, right = x >> right_bits, x & (1 << right_bits) - 1
    for r, key in enumerate(keys):
        if r % 2:
            right = right ^ (_mix(left + key & MASK) & (1 << right_bits) - 1)
        else:
            left = left ^ (_mix(right + key & MASK) & (1 << left_bits) - 1)
    return left << right_bits | right


def _halves(size: int) -> tuple[int, int]:
    bits = max((size - 1).bit_length(), 2)
    return bits // 2, bits - bits // 2


def permuted(seed: int, domain: int, epoch, offset, size: int) -> np.ndarray:
    """Items i64[n] at `offset` i64[n] of a domain of `size` items in its `epoch`-th order (an
    int, or i64[n]).

    A keyed bijection of [0, size) in O(1) memory: a Feistel network on the next power of two,
    walked until it lands inside (Black and Rogaway 2002; fewer than two steps on average).
    ValueError for an offset outside [0, size).
    """
    offset = np.asarray(offset, dtype=np.int64)
    if offset.size and (offset.min() < 0 or offset.max() >= size):
        raise ValueError(f"offset outside [0, {size}): reduce positions modulo the size of the domain first")
    epoch = np.atleast_1d(np.asarray(epoch)).astype(np.uint64)
    keys, halves = _keys(seed, domain, epoch), _halves(size)
    result = _network(offset.reshape(-1).astype(np.uint64), keys, *halves)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        own = [key[outside] if key.size > 1 else key for key in keys]
        result[outside] = _network(result[outside], own, *halves)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(offset.shape)


def items(position, size: int, seed: int, domain: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch i64[n] and item i64[n] of the one-epoch data set that `position` i64[n] of a domain
    stands for.
    """
    position = np.asarray(position, dtype=np.int64)
    if position.size and position.min() < 0:
        raise ValueError("negative position: positions count up from 0 inside each domain")
    epoch, offset = np.divmod(position, size)
    one = epoch.size > 0 and (epoch == epoch.flat[0]).all()
    return epoch, permuted(seed, domain, epoch.flat[0] if one else epoch.reshape(-1), offset, size)


def item(position: int, size: int, seed: int, domain: int) -> int:
    """`items` for one position, in Python integers: what a data set needs for one sample."""
    epoch, x = divmod(int(position), size)
    keys, halves = _keys(seed, domain, epoch), _halves(size)
    x = _network(x, keys, *halves)
    while x >= size:
        x = _network(x, keys, *halves)
    return x


class MixtureSampler:
    """Batch sampler for a torch DataLoader: each item is this rank's micro-batch, a list of
    (domain, position).

    As in Megatron, micro_batch * data_parallel_size consecutive samples make a chunk, and rank r
    takes [r * micro_batch, (r + 1) * micro_batch) of it, so global batches are the same at every
    data-parallel size. It runs ahead of training, as far as the loader prefetches, on its own
    copy of `mixture` (`frontier`), which stands at the consumed samples when the sampler is
    made. Iterating again goes on from the frontier: after a loader with prefetched batches is
    thrown away, make a new sampler. global_batch: samples a step; stop_sample: the run's end, an
    incomplete last chunk is dropped.
    """

    def __init__(
        self,
        *,
        mixture: Mixture,
        micro_batch: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        global_batch: int,
        stop_sample: int,
    ):
        if not 0 <= data_parallel_rank < data_parallel_size or micro_batch < 1:
            raise ValueError(
                f"rank {data_parallel_rank} of {data_parallel_size}, micro-batch {micro_batch}: "
                "give a rank below the data-parallel size and a micro-batch of at least 1"
            )
        chunk = micro_batch * data_parallel_size
        if global_batch < 1 or global_batch % chunk:
            raise ValueError(
                f"global batch {global_batch} is not a multiple of micro-batch x data-parallel size = "
                f"{chunk}: change one of the three"
            )
        if mixture.samples is not None and stop_sample > mixture.samples:
            raise ValueError(
                f"stop_sample {stop_sample} is past the mixture's {mixture.samples} samples: lower it"
            )
        self.frontier = mixture.copy()
        self.micro_batch, self.rank, self.size = micro_batch, data_parallel_rank, data_parallel_size
        self.stop_sample = stop_sample

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        chunk = self.micro_batch * self.size
        while self.frontier.index + chunk <= self.stop_sample:
            domain, position = self.frontier.take(chunk)
            mine = slice(self.rank * self.micro_batch, (self.rank + 1) * self.micro_batch)
            yield list(zip(domain[mine].tolist(), position[mine].tolist(), strict=True))

    def __len__(self) -> int:
        """Micro-batches still to come for this rank."""
        return max(self.stop_sample - self.frontier.index, 0) // (self.micro_batch * self.size)

    def schedule(self, weights, at_sample: int) -> None:
        """Change the weights at the frontier; ValueError when prefetching has passed `at_sample`
        already.
        """
        self.frontier.schedule(weights, at_sample)


class MixedDataset:
    """Map-style data set keyed by (domain, position) over one-epoch, unshuffled data sets, one
    for each domain.

    An item is the domain's own item, a dict, plus 'domain' and 'position' (int64). Positions
    past the end go on with the next epoch, in a fresh order.
    """

    def __init__(self, domains: list, seed: int, keys=None):
        for d, domain in enumerate(domains):
            if len(domain) == 0:
                raise ValueError(f"domain {d} has no samples: give it data or take it out of the mixture")
        self.domains, self.seed = list(domains), int(seed)
        self.keys = list(range(len(self.domains)) if keys is None else keys)

    def __len__(self) -> int:
        """Samples in one epoch of every domain, together."""
        return sum(len(domain) for domain in self.domains)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        d, position = key
        if not 0 <= d < len(self.domains) or position < 0:
            raise IndexError(
                f"(domain, position) = {key}: {len(self.domains)} domains, positions count from 0"
            )
        source = self.domains[d]
        sample = source[item(position, len(source), self.seed, self.keys[d])]
        if not isinstance(sample, dict):
            raise TypeError(
                f"domain {d} gave a {type(sample).__name__}: wrap its items as dicts, {{'text': ...}}"
            )
        return {**sample, "domain": np.int64(d), "position": np.int64(position)}
