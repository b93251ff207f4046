"""Made-up text on disk."""

import indexed_files
import numpy as np
import pytest


@pytest.fixture
def indexed_text(tmp_path):
    """write(name, sequences=600) -> the prefix of random walks over 40 tokens, with its own habit."""

    def write(name, sequences=600, length=32):
        rng = np.random.default_rng(sum(name.encode()))
        habit = 1 + sum(name[:1].encode()) % 7
        tokens = np.cumsum(rng.integers(0, 3, sequences * length + 1) * habit) % 40
        return indexed_files.write(tmp_path / name, tokens)

    return write
