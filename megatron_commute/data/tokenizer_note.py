"""PREFIX.json beside indexed data: which tokenizer made its tokens."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_commute.data.index_file import DataError

LARGEST = 1 << 20  # bytes of a note
CURE = 'write {"tokenizer": SHA256, "vocab_size": N} or remove the file'


@dataclass(frozen=True)
class Tokenizer:
    """What a PREFIX.json says."""

    prefix: str
    # whose tokens it made
    name: str
    # its sha256
    vocab_size: int
    # tokens that it knows

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both notes name one tokenizer; digits of a hash are the same in both cases."""
        return self.name.lower() == other.name.lower()


def tokenizer(prefix: str) -> Tokenizer | None:
    """The note of PREFIX, None where there is no file of that name. Raises DataError naming it."""
    path = Path(f"{prefix}.json")
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise DataError(f"{path} is no regular file", CURE)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as fault:
        problem = f"{path} cannot be read ({fault.strerror})"
        raise DataError(problem, "correct its permissions, or remove the file") from None
    if len(raw) > LARGEST:
        raise DataError(f"{path} is larger than {LARGEST} bytes, so it names no tokenizer", CURE)
    try:
        said = json_value(raw)
    except (ValueError, RecursionError) as fault:
        first = str(fault).splitlines()[0][:160]
        raise DataError(f"{path} does not name a tokenizer (no JSON: {first})", CURE) from None
    return Tokenizer(str(prefix), *_checked(path, said))


def json_value(raw: bytes):
    """What JSON in any of Unicode's encodings says. ValueError and RecursionError for what is none,
    and for text with halves of characters, which could not be printed again.
    """
    found = json.loads(raw.decode(json.detect_encoding(raw)))
    json.dumps(found, ensure_ascii=False).encode()
    return found


def _checked(path: Path, said) -> tuple[str, int]:
    name = said.get("tokenizer") if isinstance(said, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{path} does not name a tokenizer (`tokenizer` is no text)", CURE)
    size = said.get("vocab_size")
    written = isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 20
    if written or (isinstance(size, float) and size.is_integer()):
        size = int(size)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**63:
        problem = f"{path} does not name a tokenizer (`vocab_size` is no positive whole number)"
        raise DataError(problem, CURE)
    return name, size
