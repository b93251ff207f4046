"""Megatron's indexed data (PREFIX.bin, PREFIX.idx): counted, checked and read by sequences.

The header is read here rather than through megatron-core: it is a dozen lines, and data loader
workers start without the host framework. Layout of the .idx file, little-endian: 9 bytes MMIDIDX
and two zeros, u64 version 1, u8 dtype code, u64 number of texts n, u64 document boundaries,
i32[n] lengths in tokens, i64[n] offsets. Source: megatron/core/datasets/indexed_dataset.py of
megatron-core.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_commute.config import Config, Plan, holdout_parts

if TYPE_CHECKING:
    from torch.utils.data import Dataset

INDEX_MAGIC = b"MMIDIDX\x00\x00"
TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

# what a probe asks for -> field of config.HoldoutParts
PARTS = {"gradient": "gradients", "direction": "direction"}


class DataError(ValueError):
    """Files that cannot be used; `problem` and `cure` make the message."""

    def __init__(self, problem: str, cure: str):
        super().__init__(f"{problem}; {cure}")
        self.problem, self.cure = problem, cure


@dataclass(frozen=True)
class DataSummary:
    """What some prefixes hold. `tokens`: of each; `tokenizer`: sha256, None where no PREFIX.json
    has it.
    """

    prefixes: tuple[str, ...]
    tokens: tuple[int, ...]
    dtype: str
    tokenizer: str | None = None
    vocab_size: int | None = None

    def sequences(self, seq_length: int) -> tuple[int, ...]:
        """Whole sequences of each prefix: seq_length + 1 tokens, the last shared with the next."""
        return tuple(max(0, (tokens - 1) // seq_length) for tokens in self.tokens)


def data_summary(prefixes: Sequence[str]) -> DataSummary:
    """Counts and compares files that form one domain. Raises DataError naming file and cure."""
    found = [_one_file(prefix) for prefix in prefixes]
    for other in found[1:]:
        _refuse_mixed(found[0], other)
    named = next((one for one in found if one.tokenizer), found[0])
    tokens = tuple(one.tokens[0] for one in found)
    return DataSummary(tuple(prefixes), tokens, found[0].dtype, named.tokenizer, named.vocab_size)


def _refuse_mixed(first: DataSummary, other: DataSummary) -> None:
    for what in ("tokenizer", "dtype"):
        one, two = getattr(first, what), getattr(other, what)
        if one and two and one != two:
            problem = f"{other.prefixes[0]} has {what} {two[:12]}, {first.prefixes[0]} has {one[:12]}"
            raise DataError(problem, "prepare both with the same tokenizer")


def _one_file(prefix: str) -> DataSummary:
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise DataError(f"{path} is missing", "prepare the data or correct the prefix")
    head = struct.Struct("<9sQBQQ")
    with index.open("rb") as file:
        raw = file.read(head.size)
    if len(raw) < head.size or not raw.startswith(INDEX_MAGIC):
        raise DataError(f"{index} is no Megatron index", "prepare the data with IndexedDatasetBuilder")
    _, version, code, texts, _ = head.unpack(raw)
    if version != 1 or code not in TOKEN_DTYPES:
        problem = f"{index} has version {version} and dtype code {code}"
        raise DataError(problem, "prepare the data again: version 1 with integer tokens is read")
    if index.stat().st_size < head.size + texts * 12:
        raise DataError(f"{index} is cut off", "prepare the data again")
    tokens = 0
    if texts:
        lengths = np.memmap(index, dtype=np.int32, mode="r", offset=head.size, shape=(texts,))
        tokens = int(lengths.sum(dtype=np.int64))
    dtype = TOKEN_DTYPES[code]
    expected, size = tokens * np.dtype(dtype).itemsize, data.stat().st_size
    if size != expected:
        raise DataError(f"{data} has {size} bytes, its index says {expected}", "prepare the data again")
    return DataSummary((str(prefix),), (tokens,), dtype, *_tokenizer(prefix))


def _tokenizer(prefix: str) -> tuple[str | None, int | None]:
    sidecar = Path(f"{prefix}.json")
    if not sidecar.is_file():
        return None, None
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        return str(content["tokenizer"]), int(content["vocab_size"])
    except (ValueError, KeyError, TypeError) as error:
        cure = 'write {"tokenizer": SHA256, "vocab_size": N} or remove the file'
        raise DataError(f"{sidecar} does not name a tokenizer ({error!r})", cure) from error


def inspect_data(config: Config, seq_length: int) -> tuple[tuple[int, ...], tuple[int | None, ...]]:
    """Sequences of every domain and of its separate holdout (None without one), as
    `config.resolve` asks.

    Raises ConfigError, at the line of the domain, for missing or damaged files and for two
    tokenizers.
    """
    sequences: list[int] = []
    holdouts: list[int | None] = []
    first: DataSummary | None = None
    for domain in config.domains:
        held = (domain.holdout,) if isinstance(domain.holdout, str) else ()
        counts = []
        for key, prefixes in (("path", domain.path), ("holdout", held)):
            if not prefixes:
                continue
            try:
                summary = data_summary(prefixes)
                first = first or summary
                _refuse_mixed(first, summary)
            except DataError as error:
                raise config.error(f"domains.{domain.name}.{key}", error.problem, error.cure) from error
            counts.append(sum(summary.sequences(seq_length)))
        sequences.append(counts[0])
        holdouts.append(counts[1] if held else None)
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
        self.prefixes, self.seq_length, self.dtype = summary.prefixes, seq_length, summary.dtype
        self.ends = np.cumsum(summary.sequences(seq_length))
        self._maps: dict[int, np.memmap] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, item: int) -> dict[str, Any]:
        import torch

        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)} sequences")
        part = int(np.searchsorted(self.ends, item, side="right"))
        if part not in self._maps:
            self._maps[part] = np.memmap(f"{self.prefixes[part]}.bin", dtype=self.dtype, mode="r")
        start = (int(item) - int(self.ends[part - 1] if part else 0)) * self.seq_length
        tokens = self._maps[part][start : start + self.seq_length + 1]
        return {"tokens": torch.from_numpy(tokens.astype(np.int64))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


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
