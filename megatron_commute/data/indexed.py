"""Megatron's indexed data (PREFIX.bin, PREFIX.idx): counted, checked and read by sequences."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_commute.config import Config, Plan, holdout_parts
from megatron_commute.data.index_file import DataError, Layout, layout
from megatron_commute.data.shared_texts import Use, refuse_repeats, refuse_shared
from megatron_commute.data.tokenizer_note import Tokenizer, tokenizer

if TYPE_CHECKING:
    from torch.utils.data import Dataset

__all__ = ["DataError", "DataSummary", "TokenSequences", "data_summary", "inspect_data"]

# what a probe asks for -> field of config.HoldoutParts
PARTS = {"gradient": "gradients", "direction": "direction"}
FEW = 64  # runs of tokens that travel with a pickled TokenSequences


@dataclass(frozen=True)
class DataSummary:
    """What some prefixes hold."""

    prefixes: tuple[str, ...]
    tokens: tuple[int, ...]
    # of each
    layouts: tuple[Layout, ...]
    # likewise; how wide a token is stored says nothing about its meaning, and may differ
    note: Tokenizer | None
    # of the first prefix that has one

    @property
    def tokenizer(self) -> str | None:
        """sha256, None where no PREFIX.json has it."""
        return self.note.name if self.note else None

    @property
    def vocab_size(self) -> int | None:
        return self.note.vocab_size if self.note else None

    def sequences(self, seq_length: int) -> tuple[int, ...]:
        """Whole sequences of each prefix: seq_length + 1 tokens, the last shared with the next."""
        return tuple(max(0, (tokens - 1) // seq_length) for tokens in self.tokens)


def data_summary(prefixes: Sequence[str]) -> DataSummary:
    """Counts and compares files that form one domain. Raises DataError naming file and cure."""
    layouts = tuple(layout(prefix) for prefix in prefixes)
    notes = [tokenizer(prefix) for prefix in prefixes]
    named = next((note for note in notes if note), None)
    for note in notes:
        _refuse_mixed(named, note)
    tokens = tuple(one.tokens for one in layouts)
    return DataSummary(tuple(map(str, prefixes)), tokens, layouts, named)


def _refuse_mixed(first: Tokenizer | None, other: Tokenizer | None) -> None:
    if first and other and not first.same_as(other):
        problem = f"{other.prefix} has tokenizer {other.name[:12]}, {first.prefix} has {first.name[:12]}"
        raise DataError(problem, "prepare both with the same tokenizer")


def inspect_data(config: Config, seq_length: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Sequences of every domain and of its separate holdout (None without one), as
    `config.resolve` asks.

    Raises ConfigError, at the line of the domain, for missing or damaged files, for two tokenizers
    and for text that is reached twice.
    """
    sequences: list[int] = []
    holdouts: list[int | None] = []
    first: Tokenizer | None = None
    uses: list[Use] = []
    own = []
    for domain in config.domains:
        held = (domain.holdout,) if isinstance(domain.holdout, str) else ()
        counts, layouts = [], []
        for key, prefixes in (("path", domain.path), ("holdout", held)):
            if not prefixes:
                continue
            try:
                summary = data_summary(prefixes)
                _refuse_mixed(first, summary.note)
            except DataError as error:
                raise config.error(f"domains.{domain.name}.{key}", error.problem, error.cure) from error
            first = first or summary.note
            counts.append(summary.sequences(seq_length))
            layouts.append(summary.layouts)
            uses += [Use(domain.name, key, *named) for named in zip(prefixes, summary.layouts, strict=True)]
        if not held:
            own.append((domain, layouts[0], counts[0]))
        sequences.append(sum(counts[0]))
        holdouts.append(sum(counts[1]) if held else None)
    refuse_shared(config, uses)
    for domain, layouts, counts in own:
        refuse_repeats(config, domain, layouts, counts, seq_length)
    return tuple(sequences), tuple(holdouts)


class TokenSequences:
    """Map-style dataset of the whole sequences of some prefixes, in file order; none crosses a
    prefix.

    Item i is {"tokens": int64[seq_length + 1]}: one epoch of Megatron's GPTDataset before its
    shuffle. Files are mapped on first use in every process, so the object may be pickled to data
    loader workers.
    """

    def __init__(self, prefixes: Sequence[str], seq_length: int):
        summary = data_summary(prefixes)
        self.prefixes, self.seq_length = summary.prefixes, seq_length
        self.ends = np.cumsum(summary.sequences(seq_length))
        self._layouts: list[Layout | None] = list(summary.layouts)
        self._sizes = [one.sizes for one in summary.layouts]
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, item: int) -> dict[str, Any]:
        import torch

        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} sequences")
        part = int(np.searchsorted(self.ends, item, side="right"))
        if part not in self._maps:
            self._open(part)
        start = (int(item) - int(self.ends[part - 1] if part else 0)) * self.seq_length
        tokens = _tokens(self._layouts[part], self._maps[part], start, self.seq_length + 1)
        return {"tokens": torch.from_numpy(tokens)}

    def _open(self, part: int) -> None:
        prefix, known = self.prefixes[part], self._sizes[part]
        if self._layouts[part] is None:
            self._layouts[part] = layout(prefix)
        names = [f"{prefix}.idx", f"{prefix}.bin"]
        now = tuple(os.path.getsize(name) if os.path.exists(name) else 0 for name in names)
        if now != known:
            sizes = f".idx and .bin have {now[0]} and {now[1]} bytes, they had {known[0]} and {known[1]}"
            raise DataError(f"{prefix}: {sizes}", "leave the data of a run as they are, or start it again")
        # a plain array: slices of numpy's own class for maps cost more than the tokens
        self._maps[part] = np.asarray(np.memmap(f"{prefix}.bin", dtype=np.uint8, mode="r"))

    def __getstate__(self) -> dict[str, Any]:
        short = [one if one is not None and len(one.offsets) <= FEW else None for one in self._layouts]
        return {**self.__dict__, "_maps": {}, "_layouts": short}


def _tokens(place: Layout, data: np.ndarray, start: int, count: int) -> np.ndarray:
    """Tokens start..start + count - 1, i64[count], of a .bin file mapped as bytes."""
    firsts, offsets, width = place.firsts, place.offsets, place.width
    run = int(np.searchsorted(firsts, start, side="right")) - 1 if len(offsets) > 1 else 0
    begin = int(offsets[run]) + (start - int(firsts[run])) * width
    if start + count <= int(firsts[run + 1]):
        return data[begin : begin + count * width].view(place.dtype).astype(np.int64)
    last = int(np.searchsorted(firsts, start + count, side="left"))  # runs run..last - 1 are needed
    begins = offsets[run:last].tolist()
    begins[0] = begin
    bounds = np.clip(firsts[run : last + 1], start, start + count)
    lengths = (np.diff(bounds) * width).tolist()
    pieces = [data[at : at + length] for at, length in zip(begins, lengths, strict=True)]
    return np.concatenate(pieces).view(place.dtype).astype(np.int64)


def domain_datasets(config: Config, plan: Plan, seq_length: int) -> tuple[list["Dataset"], list["Dataset"]]:
    """Training part and holdout of every domain, of plan.sizes and plan.holdouts sequences."""
    from torch.utils.data import Subset

    training, held_out = [], []
    for domain, size, held in zip(config.domains, plan.sizes, plan.holdouts, strict=True):
        whole = TokenSequences(domain.path, seq_length)
        training.append(Subset(whole, range(size)))
        if isinstance(domain.holdout, str):
            held_out.append(TokenSequences((domain.holdout,), seq_length))
        else:
            held_out.append(Subset(whole, range(len(whole) - held, len(whole))))
    return training, held_out


def drawer(config, plan, seq_length, vocab_size=None):
    """draw(part, domain, numbers) of hook.Hook over the holdout of each domain; numbers wrap
    around its part.

    Raises ValueError (a bad-data fault, survived by the hook) for token numbers outside the
    vocabulary.
    """
    import torch

    _, held_out = domain_datasets(config, plan, seq_length)

    def draw(part, domain, numbers):
        parts = holdout_parts(len(held_out[domain]))
        inside = getattr(parts, PARTS[part])
        tokens = torch.stack([held_out[domain][inside[int(n) % len(inside)]]["tokens"] for n in numbers])
        if vocab_size is not None and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise ValueError(
                f"holdout of {plan.names[domain]}: token {int(tokens.max())} is outside the vocabulary of "
                f"{vocab_size}; prepare the data with the model's tokenizer"
            )
        return tokens

    return draw
