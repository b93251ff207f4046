"""What training has seen: loss of every domain, and a fingerprint of the delivered data that no
layout changes.

A step only notes what this rank saw: losses stay on their device, and nothing travels. `settle`
brings them together, where a number is wanted.
"""

import functools

import numpy as np
import torch

from megatron_commute import reduce

try:  # compiled when the package was installed with a C++ compiler at hand
    from megatron_commute.kernels._mixture import sum_of_hashes as compiled
except ImportError:
    compiled = None

# Sums of losses count in whole units of 2^-32 nats, so that they are the same in any order, on any
# number of ranks and wherever they are cut by checkpoints.
UNIT = 2.0**-32
_WIDEST = 2.0**24  # nats: a loss beyond counts as not finite


class Tally:
    """Per-domain losses since the last log line and the fingerprint since the start: after
    `settle`, equal on all ranks.

    K domains. data_rank, data_size: place of this rank among the data-parallel ranks;
    global_batch: samples of a step, where `begin` tells no other; micro_batch: sequences of one
    forward pass; group: the ranks that tell each a part of the step, the data-parallel group.
    """

    def __init__(self, *, domains, global_batch, micro_batch, data_rank, data_size, group):
        self._place = data_rank, data_size, micro_batch
        self._samples = 0
        self.begin(global_batch)
        self.losses = np.zeros((domains, 2))
        self.fingerprint = self.skipped = 0
        self.group = group
        self._forget()

    def _forget(self):
        self._steps, self._seen, self._hashes = 0, [], np.zeros((), dtype=np.uint64)

    def begin(self, samples):
        """The coming step has so many samples: this rank trains those of `mine`, i64[n]."""
        if samples == self._samples:
            return
        rank, size, micro = self._place
        # Megatron's slices: rank r takes the r-th of every micro chunk
        self.mine = np.arange(samples).reshape(-1, size, micro)[:, rank].reshape(-1)
        self._samples = samples

    def over(self, group):
        """The same tally summed over `group`: for layouts in which not every rank of a replica
        sees losses and tokens.
        """
        self.group = group
        return self

    def add(self, first_sample, domains, positions, losses, tokens):
        """One step. domains, positions: i64[global_batch] of the stream; losses f64[n], an array
        or a tensor that is left on its device, tokens as of `sample_hashes`: this rank's own, None
        where the rank has none or another rank of the group tells the same.
        """
        self._steps += 1
        own = domains[self.mine]
        if losses is not None:
            self._seen.append((own, losses))
        if tokens is not None:
            self._hashes += sum_of_hashes(first_sample + self.mine, own, positions[self.mine], tokens)

    def settle(self):
        """Bring together what all ranks of the group have seen since the last time; collective.
        Returns what it adds to `losses`: sums in nats and counts, f64[K, 2]. Without a step since
        then nothing travels.
        """
        K = len(self.losses)
        if not self._steps:
            return np.zeros((K, 2))
        sums = np.zeros(3 * K + 1, dtype=np.int64)
        if self._seen:
            domains = np.concatenate([own for own, _ in self._seen])
            losses = torch.cat([torch.as_tensor(part).double() for _, part in self._seen]).cpu().numpy()
            sound = np.abs(losses) < _WIDEST  # false for NaN
            units = np.rint(np.where(sound, losses, 0.0) / UNIT).astype(np.int64)
            np.add.at(sums[:K], domains, units)
            sums[K : 2 * K] = np.bincount(domains, minlength=K)
            sums[2 * K : 3 * K] = np.bincount(domains[~sound], minlength=K)
        sums[-1] = self._hashes.view(np.int64)
        self._forget()
        total = reduce.sum_of_numbers(sums, self.group)
        added = np.stack([total[:K] * UNIT, total[K : 2 * K]], axis=1)
        added[total[2 * K : 3 * K] > 0, 0] = np.nan
        self.losses += added
        self.fingerprint = (self.fingerprint + int(total[-1])) % 2**64
        return added

    def means(self):
        """Mean loss of every domain since the last call, None where a domain was not seen;
        starts anew.
        """
        means = [float(total / count) if count else None for total, count in self.losses]
        self.losses[:] = 0.0
        return means

    def skips(self):
        """{"skipped": steps since the last call that took their samples and whose update the
        optimiser left out}, nothing where there is none; starts anew. Equal on all ranks, as it is
        the optimiser's.
        """
        skipped, self.skipped = self.skipped, 0
        return {"skipped": skipped} if skipped else {}

    def state_dict(self):
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return {"losses": self.losses.tolist(), "fingerprint": f"{self.fingerprint:016x}", **skipped}

    def load_state_dict(self, state):
        self.skipped = state.get("skipped", 0)
        self.losses = np.array(state["losses"], dtype=np.float64)
        self.fingerprint = int(state["fingerprint"], 16)


def sum_of_hashes(index, domain, position, tokens):
    """The sum mod 2^64 of `sample_hashes`, a u64; compiled where that was installed."""
    if compiled is None:
        return sample_hashes(index, domain, position, tokens).sum(dtype=np.uint64)
    parts = tokens if isinstance(tokens, list) else [tokens]
    parts = [np.ascontiguousarray(part, dtype=np.int64) for part in parts]
    factors = _factors(max([3, *(part.shape[1] for part in parts)]))
    return np.uint64(compiled(index, domain, position, parts, factors))


def sample_hashes(index, domain, position, tokens):
    """64-bit hashes u64[n] of delivered samples: of their place in the global stream, where they
    came from, and their content.

    index, domain, position i64[n]; tokens: integer numpy array [n, s], or a list of such, whose
    rows follow one another. Added up mod 2^64 over samples, the order does not matter. Content
    enters as sum_i c_i t_i with fixed odd c_i.
    """
    parts = tokens if isinstance(tokens, list) else [tokens]
    content = [np.ascontiguousarray(part, dtype=np.int64).view(np.uint64) for part in parts]
    content = np.concatenate([part @ _factors(part.shape[1]) for part in content])
    place = np.array([index, domain, position], dtype=np.int64).view(np.uint64)
    return _mixed(_mixed(content) + _factors(3) @ place)


@functools.cache
def _factors(length):
    numbers = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mixed(numbers) | np.uint64(1)


def _mixed(x):
    """The finaliser of splitmix64: a bijection of u64 in which every bit of the input counts."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
