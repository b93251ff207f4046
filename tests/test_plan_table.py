"""plan --table: bytes, traffic and predicted seconds of probes on large models, against counts by hand."""

import json

import indexed_files
import numpy as np
import pytest
from commands import invoke

from megatron_commute.settings import memory

RUN = "--seq-length 8 --global-batch-size 4 --micro-batch-size 2 --train-iters 100"
MIXTURE = """domains:
  en: {path: en, weight: 0.5}
  ru: {path: ru, weight: 0.5}
probe: {samples: 16}
"""


def rows(folder, text=MIXTURE, *words):
    for name in ("en", "ru"):
        indexed_files.write(folder / name, np.arange(8 * 3000 + 1))
    (folder / "mixture.yaml").write_text(text)
    done = invoke("plan", folder / "mixture.yaml", *RUN.split(), "--table", *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in words else done.output


def found(told, parameters, dp, tp, pp, zero):
    wanted = {"parameters": parameters, "dp": dp, "tp": tp, "pp": pp, "zero": zero}
    (row,) = (row for row in told["rows"] if row | wanted == row)
    return row


WORDS = 50304 * 4224  # of a GPT 128 times as wide as deep with 7 billion parameters


def test_shards_by_hand(tmp_path):
    """Four splits over 64 ranks: 2 and 4 sequences of a domain, one a rank at most, and the four of the error."""
    row = found(rows(tmp_path, MIXTURE, "--json"), 7e9, 64, 1, 1, 1)
    assert row["memory"] == "sharded" and row["fits"]
    assert row["training_bytes"] == pytest.approx(7e9 * (4 + 12 / 64))
    assert row["bytes"] == pytest.approx((2 * 2 + 5) / 64 * 28e9 + 3 * 4 * WORDS)
    gradients = 4 * 2 + 4 * 2 * 2 + 4 * 2
    assert row["wire_bytes"] == pytest.approx(gradients * 3 * 63 / 64 * 28e9)
    seconds = gradients * 6 * 7e9 * 8 / 33.5e12 + row["wire_bytes"] / 50e9
    assert row["predicted_seconds"] == pytest.approx(seconds)


def test_whole_vectors_by_hand(tmp_path):
    """Four splits over 8 ranks in teams of two, which add up a direction and two gradients."""
    told = rows(tmp_path, MIXTURE, "--json")
    row = found(told, 1e9, 8, 1, 1, 1)
    assert row["memory"] == "full" and row["bytes"] == pytest.approx((2 * 2 + 5) * 4e9)
    assert row["wire_bytes"] == pytest.approx(3 * 4e9)
    sequences = 2 * 1 + 2 * 2 * 2 + 4 * 2
    assert row["predicted_seconds"] == pytest.approx(sequences * 6e9 * 8 / 33.5e12 + 12e9 / 50e9)


def test_tensor_and_pipeline_parallelism_by_hand(tmp_path):
    """A rank's share is an eighth of the words and of a quarter of the blocks; three more turns fill the pipeline."""
    row = found(rows(tmp_path, MIXTURE, "--json"), 7e9, 64, 8, 4, 1)
    own = (7e9 - WORDS) / 32 + WORDS / 8
    assert row["memory"] == "full" and row["bytes"] == pytest.approx(9 * 4 * own)
    # teams of 16: at most one sequence a rank, in one micro-batch
    turns = (1 + 3) * (2 + 2 * 2 + 4 * 2)
    assert row["wire_bytes"] == pytest.approx(2 * 15 / 16 * 3 * 4 * own)
    seconds = turns * 6 * own * 8 / 33.5e12 + row["wire_bytes"] / 50e9
    assert row["predicted_seconds"] == pytest.approx(seconds)


def test_every_size_and_only_layouts_that_exist(tmp_path):
    told = rows(tmp_path, MIXTURE, "--json")
    assert {row["parameters"] for row in told["rows"]} == {1e9, 7e9, 13e9, 70e9}
    assert {row["zero"] for row in told["rows"]} == {0, 1, 2, 3}
    for row in told["rows"]:
        assert row["training_bytes"] <= 80e9 and (row["pp"] == 1 or row["zero"] < 2)
        assert row["memory"] != "full" or row["zero"] < 3
        assert row["fits"] == (row["bytes"] <= 80e9 - row["training_bytes"])
    assert found(told, 70e9, 64, 1, 1, 3)["fits"]


def test_what_is_wished_is_counted(tmp_path):
    text = MIXTURE.replace("{samples: 16}", "{samples: 16, memory: scores, metric: identity}")
    row = found(rows(tmp_path, text, "--json"), 7e9, 64, 1, 1, 1)
    assert row["memory"] == "scores" and row["bytes"] == pytest.approx(6 / 64 * 28e9 + 3 * 4 * WORDS)
    gradients = 4 * 2 + 2 * (4 * 2 * 2) + 4 * 2
    assert row["wire_bytes"] == pytest.approx(gradients * 3 * 63 / 64 * 28e9)


def test_the_words_call_it_a_prediction(tmp_path):
    told = rows(tmp_path)
    assert "seconds, predicted" in told.splitlines()[0]
    assert "The seconds are a PREDICTION, nothing was measured: H100 SXM" in told
    assert "7 billion" in told and "sharded" in told


@pytest.mark.parametrize(("parameters", "hidden"), [(1e9, 2176), (7e9, 4224), (13e9, 5120), (70e9, 9088)])
def test_the_largest_layer_of_a_gpt_whose_size_alone_is_known(parameters, hidden):
    """Its words; blocks of 12 hidden^2, 128 times as wide as deep, make up the parameters within a twentieth."""
    assert memory.dense_gpt(parameters) == (hidden, 50304 * hidden)
    assert 12 * hidden**3 / 128 == pytest.approx(parameters, rel=0.05)
