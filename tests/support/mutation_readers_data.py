"""Readers of data under attack, each held to a reader that is not ours: the index to megatron-core's
IndexedDataset, the tokenizer note to pydantic's JSON."""

import contextlib
import json
import logging
import struct
import warnings

import indexed_files
import mutations
import numpy as np
from mutations import Difference, Reader, require_line

from megatron_commute.data.index_file import DataError
from megatron_commute.data.indexed import TokenSequences, data_summary

NAMES = ("ordered", "shuffled")


def write_indexed(folder):
    """Two small indexed files: texts in order, one of them empty, and a shuffled view with repeats."""
    rng = np.random.default_rng(0)
    lengths = np.array([7, 0, 13, 1, 30, 9, 40])
    starts = (np.cumsum(lengths) - lengths) * 2
    for name in NAMES:
        rng.integers(0, 60000, lengths.sum()).astype("<u2").tofile(folder / f"{name}.bin")
    indexed_files.write_index(folder / NAMES[0], 8, lengths, starts)
    order = [4, 2, 2, 6, 0, 1]
    indexed_files.write_index(folder / NAMES[1], 8, lengths[order], starts[order])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    logging.getLogger(indexed_dataset.__name__).setLevel(logging.ERROR)
    return indexed_dataset.IndexedDataset


def index_field(raw, rng):
    """A whole field of the index overwritten by a number near those that are there, or by an extreme one."""
    if len(raw) < 34:
        return raw
    texts = struct.unpack_from("<Q", raw, 18)[0] % 100
    places = [(17, "<B"), (18, "<Q"), (26, "<Q"), (9, "<Q")]
    places += [(34 + 4 * i, "<i") for i in range(texts)]
    places += [(34 + 4 * texts + 8 * i, "<q") for i in range(2 * texts + 1)]
    at, kind = rng.choice([place for place in places if place[0] + 8 < len(raw)])
    value = rng.choice([*mutations.HUGE, *range(-4, 210)])
    with contextlib.suppress(struct.error):  # a number that the field cannot hold leaves it as it is
        raw = raw[:at] + struct.pack(kind, value) + raw[at + struct.calcsize(kind) :]
    return raw


def read_index(folder, core):
    outcomes = set()
    for name in NAMES:
        prefix = str(folder / name)
        try:
            count = data_summary([prefix]).tokens[0]
            data = TokenSequences([prefix], 1)
            ours = [data[i]["tokens"].tolist() for i in range(len(data))]
            ours += [TokenSequences([prefix], 3)[0]["tokens"].tolist()] if count > 3 else []
        except DataError as fault:
            outcomes.add(require_line(fault, f"{prefix}.idx", f"{prefix}.bin"))
            continue
        outcomes.add("same")
        if count:  # of files without a token there is nothing to compare, and numpy maps none
            _compare(core(prefix), count, ours)
    return "refused" if "refused" in outcomes else "same"


def _compare(theirs, count, ours):
    stream = np.concatenate([theirs.get(i) for i in range(len(theirs))]).astype(np.int64).tolist()
    expected = [stream[i : i + 2] for i in range(len(stream) - 1)]
    expected += [stream[:4]] if len(stream) > 3 else []
    if count != len(stream) or ours != expected:
        raise Difference(f"{count} tokens, megatron-core gives {len(stream)} or others")


def write_note(folder):
    indexed_files.write(folder / "a", range(50))
    (folder / "a.json").write_text(json.dumps({"tokenizer": "9f86d081884c7d65", "vocab_size": 250}, indent=1))


def read_note(folder, known):
    path = folder / "a.json"
    try:
        found = data_summary([str(folder / "a")]).note
    except DataError as fault:
        return require_line(fault, path)
    if found is None:
        if path.is_symlink() or path.exists():
            raise Difference("a note that is there was passed over")
        return "same"
    said = _json(path.read_bytes())
    size = said["vocab_size"]
    if found.name != said["tokenizer"] or found.vocab_size != float(size) or isinstance(size, bool):
        raise Difference(f"{found} of {said}")
    return "same"


def _json(raw):
    """The object in the bytes, by a parser that is not Python's, in any of Unicode's encodings."""
    import pydantic_core

    for encoding in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            said = pydantic_core.from_json(raw.decode(encoding))
            said["tokenizer"], said["vocab_size"]  # noqa: B018  an object that has both
            return said
    raise Difference(f"read, and pydantic reads nothing in {raw[:80]!r}")


READERS = [
    Reader(
        name="index",
        prepare=write_indexed,
        attempt=read_index,
        mutations=mutations.BYTES | {"field": index_field, "field again": index_field},
    ),
    Reader(
        name="tokenizer note",
        prepare=write_note,
        attempt=read_note,
        mutations=mutations.TEXT,
        targets="*.json",
    ),
]
