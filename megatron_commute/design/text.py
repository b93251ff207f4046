"""What a proxy reads: the run's own domains in short sequences, repeated as often as the run
repeats them.
"""

import dataclasses

import numpy as np
import torch

from megatron_commute.data.indexed import DataError, TokenSequences, domain_datasets

COUNTED = 2**19  # tokens of a domain in which numbers are counted, before rare ones are folded
HELD = 2048  # short held-out sequences of a domain at most; half of them plan, half judge
LEAST_HELD = 64  # of each half


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from. K trained domains."""

    config: object
    # Config of the mixture file
    plan: object
    # Plan of the run
    seq_length: int
    # tokens of the run's sequences
    untrained: tuple = ()
    # (name, prefix): texts that only judge

    @property
    def names(self):
        """Of all that is judged, trained domains first."""
        return (*self.plan.names, *(name for name, _ in self.untrained))


def epochs(plan):
    """How often the run repeats each domain f64[K]: at least once."""
    return np.maximum(1.0, plan.shares * plan.samples / np.array(plan.sizes))


class Text:
    """Short sequences i64[n, sequence + 1] of a source for one seed.

    kept: token numbers that the proxy knows, the most frequent first; all others are one more
    token. () keeps every token below `vocabulary`. Raises DataError where a domain is too small.
    """

    def __init__(self, *, source, sequence, vocabulary, kept=()):
        self.source = source
        self.sequence = min(sequence, source.seq_length)
        self.pieces = source.seq_length // self.sequence  # of one sequence of the run
        self.training, self.held_out = domain_datasets(source.config, source.plan, source.seq_length)
        self.held_out += [TokenSequences((prefix,), source.seq_length) for _, prefix in source.untrained]
        self.table = _table(kept) if kept else torch.arange(vocabulary)

    def drawn(self, k, count, seed):
        """`count` different training sequences of domain k."""
        data, name = self.training[k], self.source.plan.names[k]
        most = len(data) * self.pieces
        if count > most:
            raise DataError(
                f"{name}: the proxy needs {count} different sequences of {self.sequence} tokens to repeat "
                f"them as the run does, there are {most}: lower steps or batch with --proxy"
            )
        rng = np.random.default_rng([seed, k])
        return self._read(data, np.sort(rng.choice(most, count, replace=False)))

    def held(self, name, judging):
        """Held-out sequences of `name`: those that plan, or those that judge; none is in both."""
        data = self.held_out[self.source.names.index(name)]
        most = len(data) * self.pieces
        half = min(most, HELD) // 2
        if half < LEAST_HELD:
            raise DataError(
                f"{name}: {most} held-out sequences of {self.sequence} tokens, {2 * LEAST_HELD} are needed "
                f"to plan and to judge: raise its holdout"
            )
        chosen = np.random.default_rng(0).permutation(most)[: 2 * half]
        return self._read(data, np.sort(chosen[half:] if judging else chosen[:half]))

    def _read(self, data, numbers):
        found = []
        for number in numbers:
            first = int(number) % self.pieces * self.sequence
            tokens = data[int(number) // self.pieces]["tokens"]
            found.append(tokens[first : first + self.sequence + 1])
        return self.table[torch.stack(found).clamp(max=len(self.table) - 1)]


def _table(kept):
    table = torch.full((max(kept) + 2,), len(kept), dtype=torch.int64)
    table[list(kept)] = torch.arange(len(kept))
    return table


def vocabulary(source, most):
    """(token numbers that a proxy keeps, or () for all of them; tokens that it knows).

    Where the domains have more than `most` tokens, the most frequent most - 1 stay, by the shares
    of the run, and the rest become one.
    """
    text = Text(source=source, sequence=source.seq_length, vocabulary=1)
    counts = np.zeros(0)
    for k, data in enumerate(text.training):
        tokens = _some(data, source.seq_length)
        found = torch.bincount(tokens).numpy() * (source.plan.shares[k] / len(tokens))
        size = max(len(counts), len(found))
        counts = np.pad(counts, (0, size - len(counts))) + np.pad(found, (0, size - len(found)))
    largest = max(len(counts) - 1, *(int(_some(d, source.seq_length).max()) for d in text.held_out))
    if largest < most:
        return (), largest + 1
    order = np.argsort(-counts, kind="stable")[: most - 1]
    return tuple(int(token) for token in order), most


def _some(data, seq_length):
    step = max(1, len(data) * seq_length // COUNTED)
    return torch.cat([data[i]["tokens"] for i in range(0, len(data), step)])
