"""What training has seen: loss of every domain, and a fingerprint of the delivered data that no
layout changes.
"""

import hashlib

import numpy as np

from megatron_commute import reduce


class Tally:
    """Per-domain losses since the last log line and the fingerprint since the start, equal on
    all ranks.

    K domains. data_rank, data_size: place of this rank among the data-parallel ranks;
    micro_batch: sequences of one forward pass; group: the ranks that tell each a part of the
    step, the data-parallel group.
    """

    def __init__(self, *, domains, global_batch, micro_batch, data_rank, data_size, group):
        chunks = np.arange(global_batch).reshape(-1, data_size, micro_batch)
        self.mine = chunks[:, data_rank].reshape(
            -1
        )  # Megatron's slices: rank r takes the r-th of every micro chunk
        self.losses = np.zeros((domains, 2))
        self.fingerprint = 0
        self.group = group

    def over(self, group):
        """The same tally summed over `group`: for layouts in which not every rank of a replica
        sees losses and tokens.
        """
        self.group = group
        return self

    def add(self, first_sample, domains, positions, losses, tokens):
        """One step. domains, positions: i64[global_batch] of the stream; losses f64[n], tokens
        i64[n, s]: this rank's own, None where the rank has none or another rank of the group
        tells the same.

        Sums travel every step, as 2 K + 2 numbers, so that a checkpoint between two log lines
        continues to the last bit.
        """
        own = domains[self.mine]
        K = len(self.losses)
        sums = np.zeros(2 * K + 2)
        if losses is not None:
            sums[:K], sums[K : 2 * K] = np.bincount(own, losses, K), np.bincount(own, minlength=K)
        local = 0
        if tokens is not None:
            rows = zip(first_sample + self.mine, own, positions[self.mine], tokens, strict=True)
            local = sum(sample_hash(*row) for row in rows) % 2**64
        # halves stay exact in float64 for up to two million ranks
        sums[-2:] = local & 0xFFFFFFFF, local >> 32
        total = reduce.sum_of_numbers(sums, self.group)
        self.losses += total[: 2 * K].reshape(2, K).T
        self.fingerprint = (self.fingerprint + int(total[-2]) + (int(total[-1]) << 32)) % 2**64

    def means(self):
        """Mean loss of every domain since the last call, None where a domain was not seen;
        starts anew.
        """
        means = [float(total / count) if count else None for total, count in self.losses]
        self.losses[:] = 0.0
        return means

    def state_dict(self):
        return {"losses": self.losses.tolist(), "fingerprint": f"{self.fingerprint:016x}"}

    def load_state_dict(self, state):
        self.losses = np.array(state["losses"], dtype=np.float64)
        self.fingerprint = int(state["fingerprint"], 16)


def sample_hash(index, domain, position, tokens):
    """64-bit hash of one delivered sample: its place in the global stream, where it came from,
    and its content.

    index, domain, position: ints; tokens: integer numpy array. Added up mod 2^64 over samples,
    the order does not matter.
    """
    key = np.array([index, domain, position], dtype=np.int64).tobytes()
    content = np.ascontiguousarray(tokens, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(key + content, digest_size=8).digest(), "little")
