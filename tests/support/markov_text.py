"""Indexed data of five domains, Markov chains with transitions of their own, for the language-model studies."""

import warnings

import numpy as np
import torch

NAMES = ("english", "russian", "code", "handbook_english", "handbook_russian")
VOCABULARY = 40
# settings of a model that such text is enough for
SMALL = {
    "layers": 1,
    "hidden": 8,
    "sequence": 8,
    "vocabulary": VOCABULARY,
    "held": 16,
    "probe": 16,
    "warmup": 2,
}


def write(folder, train=40, valid=12) -> str:
    """Train and valid files of every domain under `folder`, of so many documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's own, on import
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        for d, name in enumerate(NAMES):
            follows = np.random.default_rng(d).permutation(VOCABULARY)
            for part, count in (("train", train), ("valid", valid)):
                rng = np.random.default_rng([d, count])
                builder = IndexedDatasetBuilder(f"{folder}/{name}_{part}.bin", dtype=np.uint16)
                for _ in range(count):
                    text = rng.integers(VOCABULARY, size=60)
                    for i in range(1, 60):
                        text[i] = follows[text[i - 1]] if rng.random() < 0.7 else text[i]
                    builder.add_document(torch.from_numpy(text), [60])
                builder.finalize(f"{folder}/{name}_{part}.idx")
    return str(folder)
