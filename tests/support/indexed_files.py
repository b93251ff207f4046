"""Megatron's .bin/.idx, written by hand from the format's description."""

import struct

import numpy as np

VOCABULARY, LENGTH = 32, 8


def write(prefix, tokens):
    """PREFIX.bin and PREFIX.idx of one document of uint16 tokens; the prefix as text."""
    np.asarray(tokens).astype("<u2").tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2))
        file.write(struct.pack("<iqqq", len(tokens), 0, 0, 1))
    return str(prefix)


def write_index(prefix, code, lengths, pointers, boundaries=None, after=b""):
    """PREFIX.idx alone, of texts that lie at any place of a .bin file; code: of the tokens' dtype."""
    boundaries = range(len(lengths) + 1) if boundaries is None else boundaries
    head = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(lengths), len(boundaries))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(head + np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes())
        file.write(np.array(boundaries, "<i8").tobytes() + after)
    return str(prefix)


def write_domain(prefix, sequences, seed):
    """Indexed data of `sequences` whole sequences of LENGTH tokens in which a fixed token follows each, mostly."""
    rng = np.random.default_rng(seed)
    follows = np.random.default_rng(seed + 100).permutation(VOCABULARY)
    tokens = rng.integers(VOCABULARY, size=sequences * LENGTH + 1)
    for i in range(1, len(tokens)):
        tokens[i] = follows[tokens[i - 1]] if rng.random() < 0.8 else tokens[i]
    return write(prefix, tokens)
