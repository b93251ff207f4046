"""Text to tokens: one byte-level BPE, and Megatron's indexed files written with it."""

import logging
import warnings
from pathlib import Path

END_OF_DOCUMENT = "<|endoftext|>"


def train_tokenizer(domains: list[list[str]], vocab_size: int):
    """Byte-level BPE on equally many bytes of each domain (a list of texts); equal texts give equal
    files.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    share = min(sum(len(text.encode()) for text in texts) for texts in domains)
    portions = []
    for texts in domains:
        left = share
        for text in texts:
            portion = text.encode()[:left]
            left -= len(portion)
            portions.append(portion.decode(errors="ignore"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(portions, trainer)
    return tokenizer


def _builder(path: Path):
    import numpy

    # Both packages warn at import of accelerators that are absent; preparing data needs none of
    # them.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    return IndexedDatasetBuilder(str(path), dtype=numpy.uint16)


def write(prefix: Path, texts: list[str], tokenizer, progress) -> int:
    """PREFIX.bin and .idx: uint16, one sequence a document, each ended by END_OF_DOCUMENT; returns
    tokens.
    """
    import numpy

    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    builder = _builder(prefix.with_suffix(".bin"))
    tokens = 0
    for start in range(0, len(texts), 64):
        batch = texts[start : start + 64]
        for text, encoding in zip(batch, tokenizer.encode_batch(batch), strict=True):
            ids = numpy.array([*encoding.ids, end], dtype=numpy.uint16)
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
            progress.update(len(text.encode()))
    builder.finalize(str(prefix.with_suffix(".idx")))
    return tokens
