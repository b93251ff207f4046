"""Indexed data against the host: counts, sequences and damaged files."""

import hashlib
import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from megatron_commute.config import ConfigError, Run, load, resolve
from megatron_commute.data.indexed import (
    DataError,
    TokenSequences,
    data_summary,
    domain_datasets,
    inspect_data,
)

SEQ = 8


@pytest.fixture(scope="module")
def host():
    """megatron-core's own writer and readers; its import warns about Transformer Engine and Apex."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import gpt_dataset, indexed_dataset, utils
    return indexed_dataset, gpt_dataset, utils


@pytest.fixture
def prepare(host, tmp_path):
    """prepare(name, lengths): PREFIX of documents with these lengths in tokens, numbered on from `first`."""

    def write(name, lengths, dtype=np.uint16, first=0, tokenizer=None):
        prefix = str(tmp_path / name)
        builder = host[0].IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for length in lengths:
            builder.add_document(np.arange(first, first + length), [length])
            first += length
        builder.finalize(f"{prefix}.idx")
        if tokenizer:
            content = {"tokenizer": hashlib.sha256(tokenizer.encode()).hexdigest(), "vocab_size": 512}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return prefix

    return write


def test_counts(prepare):
    one, two = prepare("one", [5, 1, 20, 0, 7]), prepare("two", [SEQ])
    summary = data_summary([one, two])
    assert (
        summary.tokens == (33, 8)
        and {one.dtype for one in summary.layouts} == {"uint16"}
        and summary.tokenizer is None
    )
    assert summary.sequences(SEQ) == (4, 0), "33 tokens are 4 sequences of 8 and the token after the last"
    assert data_summary([prepare("none", [])]).tokens == (0,)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sequences_are_those_of_megatrons_unshuffled_epoch(host, prepare, dtype, tmp_path, monkeypatch):
    prefix = prepare("one", [5, 1, 20, 30, 7, 41], dtype=dtype)
    ours = TokenSequences([prefix], SEQ)
    shuffled = host[1]._build_document_index
    monkeypatch.setattr(host[1], "_build_document_index", lambda *given: np.sort(shuffled(*given)))
    theirs = _stock_epoch(host, prefix, tmp_path)
    assert len(ours) == len(theirs) == 12
    order = theirs.shuffle_index
    for place in range(len(ours)):
        item = theirs[place]
        both = torch.cat([item["tokens"], item["labels"][-1:]])
        assert torch.equal(ours[int(order[place])]["tokens"], both)


def _stock_epoch(host, prefix, tmp_path):
    """One epoch of megatron-core's GPTDataset over all documents."""
    indexed_dataset, gpt_dataset, utils = host

    class Tokenizer:
        unique_identifiers = {"class": "none"}  # noqa: RUF012
        eod, pad, vocab_size = 0, -1, 512

    config = gpt_dataset.GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low = indexed_dataset.IndexedDataset(prefix)
    documents = np.arange(low.sequence_lengths.shape[0], dtype=np.int32)
    return gpt_dataset.GPTDataset(low, prefix, documents, None, utils.Split.train, config)


def test_sequences_never_cross_prefixes(prepare):
    one, none, two = prepare("one", [20]), prepare("none", [3]), prepare("two", [18], first=100)
    data = TokenSequences([one, none, two], SEQ)
    assert len(data) == 4, "a prefix without a sequence is passed over"
    firsts = [data[i]["tokens"].tolist() for i in range(4)]
    assert firsts == [list(range(a, a + SEQ + 1)) for a in (0, 8, 100, 108)]
    assert data[0]["tokens"].dtype == torch.int64
    for outside in (-1, 4):
        with pytest.raises(IndexError, match=f"item {outside} of 4"):
            data[outside]


def test_pickled_without_its_maps(prepare):
    data = TokenSequences([prepare("one", [5000])], SEQ)
    before = data[3]["tokens"]
    assert len(pickle.dumps(data)) < 2000
    assert torch.equal(pickle.loads(pickle.dumps(data))[3]["tokens"], before)
    loader = DataLoader(data, batch_size=4, num_workers=2)
    batches = torch.cat([batch["tokens"] for batch in loader])
    assert torch.equal(batches[:, 0], torch.arange(0, 4992, SEQ))


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        (".idx", None, r"en\.idx is missing; prepare the data or correct the prefix"),
        (
            ".bin",
            lambda raw: raw[:-2],
            r"en\.bin has 398 bytes, text 1 of its index ends at byte 400; prepare the data again",
        ),
        (
            ".idx",
            lambda raw: b"TNTIDX" + raw[6:],
            r"en\.idx is no Megatron index; prepare the data with Indexed",
        ),
        (
            ".idx",
            lambda raw: raw[:9] + b"\2" + raw[10:],
            r"version 2 and dtype code 8; prepare the data again",
        ),
        (
            ".idx",
            lambda raw: raw[:17] + b"\7" + raw[18:],
            r"version 1 and dtype code 7; prepare the data again",
        ),
        (
            ".idx",
            lambda raw: raw[:40],
            r"en\.idx is cut off: 2 texts and 3 boundaries are 82 bytes, it has 40; prepare the data again",
        ),
    ],
)
def test_damaged_files(prepare, tmp_path, ending, change, message):
    prefix = prepare("en", [100, 100])
    path = tmp_path / f"en{ending}"
    if change is None:
        path.unlink()
    else:
        damage(path, change)
    with pytest.raises(DataError, match=message):
        data_summary([prefix])
    (tmp_path / "m.yaml").write_text("domains:\n  en:\n    path: en\n")
    with pytest.raises(ConfigError, match=rf"m\.yaml:3: domains\.en\.path: .*{message}"):
        inspect_data(load(tmp_path / "m.yaml"), SEQ)


def test_different_tokenizers_are_refused(prepare, tmp_path):
    prepare("a", [100], tokenizer="one")
    prepare("b", [100], tokenizer="two")
    prepare("d", [100])
    within = tmp_path / "within.yaml"
    within.write_text("domains:\n  en:\n    path: [d, a, d2]\n  ru:\n    path: b\n")
    prepare("d2", [50])
    name = {text: hashlib.sha256(text.encode()).hexdigest()[:12] for text in ("one", "two")}
    with pytest.raises(ConfigError) as caught:
        inspect_data(load(within), SEQ)
    assert f"within.yaml:5: domains.ru.path: {tmp_path}/b has tokenizer {name['two']}, " in str(caught.value)
    assert str(caught.value).endswith(f"has {name['one']}; prepare both with the same tokenizer")
    within.write_text("domains: {en: {path: [a, b]}}")
    with pytest.raises(ConfigError, match=r"within\.yaml:1: domains\.en\.path: .*/b has tokenizer"):
        inspect_data(load(within), SEQ)
    within.write_text("domains: {en: {path: d2}, de: {path: a}, ru: {path: b}}")
    with pytest.raises(ConfigError, match=r"domains\.ru\.path: .*/b has tokenizer .*/a has"):
        inspect_data(load(within), SEQ)


def test_unusable_tokenizer_note(prepare, tmp_path):
    prefix = prepare("a", [100])
    (tmp_path / "a.json").write_text('{"vocab": 3}')
    with pytest.raises(DataError, match=r"a\.json does not name a tokenizer .*; write \{"):
        data_summary([prefix])


def test_training_part_and_holdout(prepare, tmp_path):
    prepare("en", [8 * 400 + 1])
    prepare("ru", [8 * 100 + 1], first=4000)
    prepare("held", [8 * 16 + 1], first=9000)
    file = tmp_path / "m.yaml"
    file.write_text(
        "domains:\n  en: {path: en, weight: 0.5, holdout: 40}\n  ru: {path: ru, weight: 0.5, holdout: held}\n"
        "mode: act\nprobe: {samples: 4}\n"
    )
    config = load(file)
    sequences, holdouts = inspect_data(config, SEQ)
    assert (sequences, holdouts) == ((400, 100), (None, 16))
    plan = resolve(config, Run(SEQ, 4, 2, 1, 10), sequences, holdouts)
    training, held = domain_datasets(config, plan, SEQ)
    assert [len(part) for part in training] == [360, 100] and [len(part) for part in held] == [40, 16]
    assert held[0][0]["tokens"][0] == 360 * SEQ and training[0][359]["tokens"][-1] == 360 * SEQ
    assert held[1][0]["tokens"][0] == 9000
