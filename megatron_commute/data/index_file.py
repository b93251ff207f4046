"""The .idx file of Megatron's indexed data: every field read and checked.

It is read here rather than through megatron-core: data loader workers start without the host
framework, and a damaged file is named instead of read. Layout, little-endian: 9 bytes MMIDIDX and
two zeros, u64 version 1, u8 dtype code, u64 number of texts n, u64 number of boundaries d, i32[n]
lengths in tokens, i64[n] bytes before each text in the .bin file, i64[d] texts before each boundary
of documents, and of multimodal data i8[n] modes. Source:
megatron/core/datasets/indexed_dataset.py of megatron-core.

The tokens of a file are those of text 0, 1, ... as lengths and pointers name them: texts may lie in
any order, repeatedly, and not all of the .bin file need be named. Megatron-DeepSpeed's
preprocess_data.py --append-eod leaves the appended tokens out of its lengths and pointers, so that
the host reads the first tokens of a longer file.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
HEAD = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 16  # texts that are looked at together, few enough for a processor's cache


class DataError(ValueError):
    """Files that cannot be used; `problem` and `cure` make the message."""

    def __init__(self, problem: str, cure: str):
        super().__init__(f"{problem}; {cure}")
        self.problem, self.cure = problem, cure


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the tokens of a PREFIX lie in its .bin file: runs of tokens that follow each other in
    both; one run where the texts are in order.
    """

    dtype: str
    firsts: np.ndarray
    # number of the first token of every run, and that of all tokens: i64[runs + 1]
    offsets: np.ndarray
    # byte of the .bin file at which every run begins, i64[runs]
    sizes: tuple[int, int]
    # bytes of the .idx and of the .bin file
    file: tuple[int, int]
    # device and inode of the .bin file: equal where two names are of one file

    @property
    def tokens(self) -> int:
        return int(self.firsts[-1])

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return np.dtype(self.dtype).itemsize

    def ranges(self, begin: int, end: int) -> np.ndarray:
        """Bytes of the .bin file that tokens begin..end - 1 lie in, i64[pieces, 2] in ascending
        order.
        """
        firsts = np.clip(self.firsts, begin, end)
        starts = self.offsets + (firsts[:-1] - self.firsts[:-1]) * self.width
        found = np.stack([starts, starts + np.diff(firsts) * self.width], axis=1)
        found = found[found[:, 0] < found[:, 1]]
        return found[np.argsort(found[:, 0], kind="stable")]


def meet(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two ascending lists of ranges, i64[:, 2], have a byte in common."""
    if not len(one) or not len(other):
        return False
    furthest = np.maximum.accumulate(other[:, 1])  # ranges of one list may overlap themselves
    before = np.searchsorted(other[:, 0], one[:, 1], side="left")
    return bool((np.append(0, furthest)[before] > one[:, 0]).any())


def layout(prefix: str) -> Layout:
    """The Layout of PREFIX.idx and PREFIX.bin. Raises DataError naming file and cure."""
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            what = "is no regular file" if os.path.lexists(path) else "is missing"
            raise DataError(f"{path} {what}", "prepare the data or correct the prefix")
    try:
        bin_stat = data.stat()
        with index.open("rb") as file, data.open("rb"):
            found = _read(file, index, data, bin_stat)
            now = (os.fstat(file.fileno()).st_size, data.stat().st_size)
    except OSError as fault:
        problem = f"{fault.filename or index} cannot be read ({fault.strerror})"
        raise DataError(problem, "correct its permissions, or copy it again") from None
    if now != found.sizes:
        raise DataError(f"{prefix}: is still being written", "wait until the data are prepared")
    return found


def _read(file, index: Path, data: Path, bin_stat) -> Layout:
    raw, size = file.read(HEAD.size), os.fstat(file.fileno()).st_size
    if len(raw) < HEAD.size or not raw.startswith(MAGIC):
        raise DataError(f"{index} is no Megatron index", "prepare the data with IndexedDatasetBuilder")
    _, version, code, texts, boundaries = HEAD.unpack(raw)
    if version != 1 or code not in TOKEN_DTYPES:
        problem = f"{index} has version {version} and dtype code {code}"
        raise DataError(problem, "prepare the data again: version 1 with integer tokens is read")
    whole = HEAD.size + 12 * texts + 8 * boundaries
    if size < whole:
        problem = (
            f"{index} is cut off: {texts} texts and {boundaries} boundaries are {whole} bytes, it has {size}"
        )
        raise DataError(problem, "prepare the data again")
    if size not in (whole, whole + texts):
        problem = f"{index} has {size - whole} bytes after its last section"
        raise DataError(problem, "prepare the data again, or cut off what was added")
    dtype = TOKEN_DTYPES[code]
    width, length = np.dtype(dtype).itemsize, bin_stat.st_size
    if length % width:
        problem = f"{data} has {length} bytes, which end inside a token of {width} bytes"
        raise DataError(problem, "it is cut off or still being written: wait, or prepare the data again")
    _check_boundaries(file, index, texts, boundaries)
    runs = _Runs(width=width)
    for number in range(0, texts, _CHUNK):
        count = min(_CHUNK, texts - number)
        lengths = _section(file, index, "<i4", HEAD.size + 4 * number, count)
        pointers = _section(file, index, "<i8", HEAD.size + 4 * texts + 8 * number, count)
        if not runs.go_on(lengths, pointers, length):
            lengths = lengths.astype(np.int64)
            _check_texts(index, data, number, lengths, pointers, width, length)
            runs.add(lengths, pointers)
    firsts, offsets = runs.joined()
    return Layout(dtype, firsts, offsets, (size, length), (bin_stat.st_dev, bin_stat.st_ino))


def _section(file, index: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    file.seek(offset)
    found = np.frombuffer(file.read(np.dtype(dtype).itemsize * count), dtype=dtype)
    if len(found) < count:
        raise DataError(f"{index} is cut off", "prepare the data again")
    return found


def _check_boundaries(file, index: Path, texts: int, boundaries: int) -> None:
    """Documents are ranges of all texts: boundaries begin at 0, never fall and end at the last."""
    last = 0
    for number in range(0, boundaries, _CHUNK):
        count = min(_CHUNK, boundaries - number)
        found = _section(file, index, "<i8", HEAD.size + 12 * texts + 8 * number, count)
        before = np.append(last, found[:-1])
        wrong = (found < before) | (found > texts)
        if number == 0:
            wrong[0] |= found[0] != 0
        if wrong.any():
            at = int(wrong.argmax())
            problem = f"{index}: boundary {number + at} of its documents is text {found[at]} of {texts}"
            raise DataError(problem, "it is damaged: copy it again, or prepare the data again")
        last = int(found[-1])
    if last != texts or not boundaries:
        problem = f"{index}: its documents end at text {last} of {texts}"
        raise DataError(problem, "it is damaged: copy it again, or prepare the data again")


def _check_texts(index, data, number, lengths, pointers, width, size) -> None:
    """The texts from `number` on lie whole in a .bin file of `size` bytes, on whole tokens."""
    again = "it is damaged: copy it again, or prepare the data again"
    if (lengths < 0).any():
        at = int((lengths < 0).argmax())
        raise DataError(f"{index}: text {number + at} has {lengths[at]} tokens", again)
    wrong = (pointers < 0) | (pointers % width != 0)
    if wrong.any():
        at = int(wrong.argmax())
        problem = f"{index}: text {number + at} begins at byte {pointers[at]}"
        raise DataError(f"{problem}, which is no whole number of tokens of {width} bytes", again)
    wrong = (pointers > size) | (lengths * width > size - pointers)
    if wrong.any():
        at = int(wrong.argmax())
        end = int(pointers[at]) + int(lengths[at]) * width
        problem = f"{data} has {size} bytes, text {number + at} of its index ends at byte {end}"
        raise DataError(problem, "prepare the data again, or copy both files again")


class _Runs:
    """Runs of texts that follow each other, gathered chunk by chunk."""

    def __init__(self, *, width):
        self.width, self.tokens, self.end = width, 0, -1
        self.firsts, self.offsets = [], []

    def go_on(self, lengths, pointers, size) -> bool:
        """Whether the next texts, none of which is empty, follow the last run and each other and
        lie in a .bin file of `size` bytes; where they do, they are added.

        Nearly every index is of this kind, so that it costs few passes.
        """
        if pointers[0] != self.end or lengths.min() < 1:
            return False
        if not np.array_equal(pointers[1:] - pointers[:-1], lengths[:-1].astype(np.int64) * self.width):
            return False
        end = int(pointers[-1]) + int(lengths[-1]) * self.width
        if end > size:
            return False
        self.tokens, self.end = self.tokens + int(lengths.sum(dtype=np.int64)), end
        return True

    def add(self, lengths, pointers):
        """The next texts: i64 lengths in tokens, i64 bytes before each."""
        if not lengths.all():
            pointers, lengths = pointers[lengths > 0], lengths[lengths > 0]
        if not len(lengths):
            return
        ends = lengths * self.width
        ends += pointers
        begins = np.empty(len(lengths), dtype=bool)
        begins[0] = pointers[0] != self.end
        np.not_equal(pointers[1:], ends[:-1], out=begins[1:])
        if begins.any():
            before = np.cumsum(lengths) - lengths
            self.firsts.append(self.tokens + before[begins])
            self.offsets.append(pointers[begins])
        self.tokens += int(lengths.sum())
        self.end = int(ends[-1])

    def joined(self):
        """(firsts, offsets) of a Layout."""
        firsts = np.concatenate([*self.firsts, [self.tokens]]).astype(np.int64)
        return firsts, np.concatenate([*self.offsets, []]).astype(np.int64)
