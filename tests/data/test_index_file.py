"""The .idx reader against megatron-core's IndexedDataset and Megatron-DeepSpeed's own tools and reader."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import indexed_files
import numpy as np
import pytest
import torch

from megatron_commute.config import load
from megatron_commute.data.index_file import DataError, layout
from megatron_commute.data.indexed import TokenSequences, data_summary, inspect_data

SEQ = 8
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture(scope="module")
def core():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset.IndexedDataset


def both(core, prefix, length=SEQ):
    """Holds our sequences to the tokens that megatron-core gives, text after text; the tokens."""
    theirs = core(str(prefix))
    stream = np.concatenate([theirs.get(i) for i in range(len(theirs))]).astype(np.int64)
    ours = TokenSequences([str(prefix)], length)
    assert data_summary([str(prefix)]).tokens == (len(stream),)
    assert len(ours) == max(0, (len(stream) - 1) // length)
    for i in range(len(ours)):
        assert ours[i]["tokens"].tolist() == stream[i * length : (i + 1) * length + 1].tolist()
    return stream.tolist()


@pytest.mark.parametrize("dtype", CODES)
def test_texts_in_any_order_repeated_empty_and_left_out(core, tmp_path, dtype):
    rng = np.random.default_rng(0)
    width = np.dtype(dtype).itemsize
    tokens = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 300, dtype=dtype, endpoint=True)
    for case in range(20):
        texts = int(rng.integers(1, 60))
        begins = rng.integers(0, 290, texts)
        lengths = rng.integers(0, 10, texts)
        name = tmp_path / f"{case}"
        indexed_files.write_index(name, CODES[dtype], lengths, begins * width)
        tokens.tofile(f"{name}.bin")
        both(core, name)


def test_the_hosts_own_order_is_one_run_and_a_shuffled_view_is_many(core, tmp_path):
    tokens, lengths = np.arange(1000), [5, 0, 1, 20, 0, 7, 900]
    order = [6, 2, 0, 1, 3, 5]
    starts = (np.cumsum(lengths) - lengths) * 2
    tokens.astype("<u2").tofile(tmp_path / "a.bin")
    indexed_files.write_index(tmp_path / "a", 8, lengths, starts)
    assert len(layout(str(tmp_path / "a")).offsets) == 1
    assert both(core, tmp_path / "a") == list(range(933)), "a longer .bin is read as far as the index says"
    (tmp_path / "b.bin").symlink_to(tmp_path / "a.bin")
    indexed_files.write_index(tmp_path / "b", 8, [lengths[i] for i in order], [starts[i] for i in order])
    assert len(layout(str(tmp_path / "b")).offsets) == 4
    assert both(core, tmp_path / "b")[:3] == [33, 34, 35]


def test_many_runs_travel_to_another_process_by_their_file(tmp_path):
    import pickle

    lengths = np.full(3000, 5)
    np.arange(15000).astype("<u2").tofile(tmp_path / "a.bin")
    indexed_files.write_index(tmp_path / "a", 8, lengths, (np.cumsum(lengths) - lengths)[::-1] * 2)
    data = TokenSequences([str(tmp_path / "a")], SEQ)
    sent = pickle.dumps(data)
    assert len(sent) < 2000
    assert torch.equal(pickle.loads(sent)[700]["tokens"], data[700]["tokens"])
    assert data[0]["tokens"].tolist() == [14995, 14996, 14997, 14998, 14999, 14990, 14991, 14992, 14993]


def test_more_tokens_than_2_to_the_31_in_sparse_files(core, tmp_path):
    """Two texts of 2^31 - 1 tokens and a short one between; no byte of them is allocated."""
    big, name = 2**31 - 1, tmp_path / "big"
    with open(f"{name}.bin", "wb") as file:
        file.truncate(2 * (2 * big + 20))
        file.seek(2 * big)
        file.write(np.arange(1, 21, dtype="<u2").tobytes())
    lengths, pointers = [big, 20, big], [0, 2 * big, 2 * (big + 20)]
    indexed_files.write_index(name, 8, lengths, pointers)
    summary, data = data_summary([str(name)]), TokenSequences([str(name)], 1024)
    assert summary.tokens == (2 * big + 20,) and len(data) == (2 * big + 19) // 1024
    across = data[(big - 1) // 1024]["tokens"].tolist()
    assert across[:1023] == [0] * 1023 and across[1023:] == [1, 2]
    assert core(str(name)).get(1).tolist() == list(range(1, 21))
    indexed_files.write_index(name, 8, lengths[::-1], pointers[::-1])  # the last text first
    swapped = TokenSequences([str(name)], 1024)
    assert len(swapped) == len(data) and swapped[(big - 1) // 1024]["tokens"].tolist() == across
    assert os.stat(f"{name}.bin").st_blocks * 512 < 1 << 20


CASES = {
    "text 1 of its index ends at byte 9223372036854775802": {"pointers": [0, 2**63 - 8]},
    "text 1 begins at byte -2": {"pointers": [0, -2]},
    "text 1 begins at byte 5, which is no whole number of tokens of 2 bytes": {"pointers": [0, 5]},
    "text 1 of its index ends at byte 24": {"pointers": [0, 22]},
    "text 0 has -1 tokens": {"lengths": [-1, 2]},
    "1 bytes after its last section": {"after": b"\0"},
    "boundary 1 of its documents is text 3 of 2": {"boundaries": [0, 3]},
    "boundary 2 of its documents is text 1 of 2": {"boundaries": [0, 2, 1]},
    "boundary 0 of its documents is text 1 of 2": {"boundaries": [1, 2]},
    "its documents end at text 1 of 2": {"boundaries": [0, 1]},
    "its documents end at text 0 of 2": {"boundaries": []},
    "20 bytes, .*is cut off|no Megatron index": {"cut": 20},
}


@pytest.mark.parametrize("told", CASES)
def test_an_invalid_index_is_refused_by_name(tmp_path, told):
    np.arange(10).astype("<u2").tofile(tmp_path / "a.bin")
    given = {"lengths": [5, 1], "pointers": [0, 10], "after": b"", "boundaries": [0, 1, 2]} | CASES[told]
    cut = given.pop("cut", None)
    indexed_files.write_index(tmp_path / "a", 8, **given)
    index = tmp_path / "a.idx"
    index.write_bytes(index.read_bytes()[:cut])
    with pytest.raises(DataError, match=told) as caught:
        data_summary([str(tmp_path / "a")])
    assert str(index) in str(caught.value) or str(tmp_path / "a.bin") in str(caught.value)


def test_files_that_change_under_a_run_are_noticed(tmp_path):
    name = indexed_files.write(tmp_path / "a", range(100))
    data = TokenSequences([name], SEQ)
    with open(f"{name}.bin", "ab") as file:
        file.write(b"\1\0")
    with pytest.raises(DataError, match="have 62 and 202 bytes, they had 62 and 200; leave the data"):
        data[0]
    with open(f"{name}.bin", "ab") as file:
        file.write(b"\1")
    with pytest.raises(DataError, match="203 bytes, which end inside a token of 2 bytes"):
        data_summary([name])
    os.unlink(f"{name}.bin")
    os.mkfifo(f"{name}.bin")
    with pytest.raises(DataError, match=r"a\.bin is no regular file; prepare"):
        data_summary([name])


def test_sections_that_megatron_core_knows_are_no_fault(core, tmp_path):
    np.arange(40).astype("<u2").tofile(tmp_path / "a.bin")
    indexed_files.write_index(tmp_path / "a", 8, [20, 20], [0, 40], after=b"\0\1")  # modes of multimodal data
    both(core, tmp_path / "a")


def test_the_width_of_a_token_is_no_difference_of_tokenizers(core, tmp_path):
    """Megatron's tool stores small vocabularies as uint16 and larger ones as int32."""
    tokens = np.arange(SEQ * 600 + 1) % 100
    tokens.astype("<u2").tofile(tmp_path / "a.bin")
    tokens[::-1].astype("<i4").tofile(tmp_path / "b.bin")
    indexed_files.write_index(tmp_path / "a", 8, [len(tokens)], [0])
    indexed_files.write_index(tmp_path / "b", 4, [len(tokens)], [0])
    (tmp_path / "m.yaml").write_text("domains: {x: {path: a}, y: {path: b}}")
    assert inspect_data(load(tmp_path / "m.yaml"), SEQ) == ((600, 600), (None, None))
    data = TokenSequences([str(tmp_path / "a"), str(tmp_path / "b")], SEQ)
    assert data[0]["tokens"].tolist() == tokens[:9].tolist()
    assert data[600]["tokens"].tolist() == tokens[::-1][:9].tolist()
    (tmp_path / "m.yaml").write_text("domains: {x: {path: a, holdout: b}}")
    inspect_data(load(tmp_path / "m.yaml"), SEQ)


@pytest.mark.megatron_deepspeed
@pytest.mark.skipif("MEGATRON_DEEPSPEED" not in os.environ, reason="MEGATRON_DEEPSPEED names no checkout")
def test_what_the_hosts_own_tool_writes_with_append_eod(core, tmp_path, monkeypatch):
    tree = Path(os.environ["MEGATRON_DEEPSPEED"])
    texts = [{"text": " ".join(str(k % 90) for k in range(n, n + 31))} for n in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(text)}\n" for text in texts))
    command = [
        sys.executable,
        "tools/preprocess_data.py",
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
    ]
    command += [
        tmp_path / "out",
        "--tokenizer-type",
        "NullTokenizer",
        "--vocab-size",
        "100",
        "--dataset-impl",
    ]
    command += ["mmap", "--workers", "1", "--append-eod"]
    # the tool names classes of nltk even where no sentence is split
    (tmp_path / "nltk.py").write_text(
        "class tokenize:\n    class punkt:\n        class PunktLanguageVars: pass\n"
    )
    surroundings = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, timeout=300, env=surroundings)
    assert done.returncode == 0, done.stderr
    name = tmp_path / "out_text_document"
    stream = both(core, name)
    spec = importlib.util.spec_from_file_location("host_index", tree / "megatron/data/indexed_dataset.py")
    module = importlib.util.module_from_spec(spec)
    # all that this file asks of its package
    monkeypatch.setattr(sys.modules["megatron"], "print_rank_0", lambda *words: None, raising=False)
    spec.loader.exec_module(module)
    host = module.MMapIndexedDataset(str(name), skip_warmup=True)
    assert stream == np.concatenate([host.get(i) for i in range(len(host))]).tolist()
    assert os.path.getsize(f"{name}.bin") == np.dtype(host.dtype).itemsize * (len(stream) + 12)
