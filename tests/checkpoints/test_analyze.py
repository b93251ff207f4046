"""analyze: the live probe's numbers, resumption, bad input at the command line, and the check of optimality."""

import json
import shutil
import types
from pathlib import Path

import jobs
import numpy as np
import pytest
from checkpoint_runs import call, digests, probes

from megatron_commute.checkpoints import analysis as checkpoints
from megatron_commute.checkpoints import results as checkpoint_results
from megatron_commute.record import log as record


@pytest.fixture(scope="module")
def done(folder):
    """The command on the whole run: (its output, the folder that it filled, whether a file of the run changed)."""
    before = digests(folder / "run")
    found = call(folder / "run", "--data", folder / "mixture.yaml", "--out", folder / "out")
    assert found.exit_code == 0, found.output
    return found.output, folder / "out", digests(folder / "run") == before


def test_the_numbers_are_those_of_the_live_probes_and_no_checkpoint_is_touched(folder, done):
    output, out, untouched = done
    assert untouched and "memory: about" in output
    for name in ("commute.jsonl", "report.html", "analysis.csv"):
        assert (out / name).stat().st_size > 0 and str(out / name) in output
    assert [checkpoints.first_number(None, step, 4) for step in (1, 4, 5, 8, 12)] == [0, 0, 1, 1, 2]
    live, later = probes(folder / "run"), probes(out)
    assert sorted(live) == [4, 8] and sorted(later) == [4, 8, 10]
    last = later[10]  # of a run that has ended, all budgets used up
    assert sum(last["weights"]) == pytest.approx(1)
    assert np.dot(last["weights"], last["score"]) == pytest.approx(0, abs=1e-9 * np.abs(last["score"]).max())
    for step, line in live.items():
        scale = np.abs(line["M"]).max()
        for key in ("P", "M", "P_se", "gap_se"):
            assert np.abs(np.array(line[key]) - later[step][key]).max() <= 1e-4 * scale, key
        np.testing.assert_allclose(
            later[step]["score"], line["score"], atol=1e-4 * np.abs(line["score"]).max()
        )
        for key in ("windows", "lr", "decay", "weights", "sample"):
            assert later[step][key] == line[key]


def test_a_killed_analysis_goes_on_and_ends_in_the_same_record(folder, done, tmp_path):
    whole = (done[1] / "commute.jsonl").read_bytes().splitlines(keepends=True)
    first = next(i for i, line in enumerate(whole) if json.loads(line)["event"] == "probe") + 1
    for cut in (whole[first][:30], whole[first] + whole[first + 1][:50]):
        out = tmp_path / f"out{len(cut)}"
        out.mkdir()
        (out / "commute.jsonl").write_bytes(b"".join(whole[:first]) + cut)
        found = call(folder / "run", "--data", folder / "mixture.yaml", "--out", out)
        assert found.exit_code == 0 and "1 checkpoints are in" in found.output
        assert without_timing(out) == without_timing(done[1])


def without_timing(run):
    return [{key: value for key, value in line.items() if key != "timing"} for line in record.read(run)]


def test_checkpoints_that_come_later_are_put_in_order(folder, done, tmp_path):
    for steps in ((8, 10), (4, 8, 10)):
        places = [folder / "run" / f"global_step{step}" for step in steps]
        assert call(*places, "--data", folder / "mixture.yaml", "--out", tmp_path).exit_code == 0
    assert without_timing(tmp_path) == without_timing(done[1])


def test_a_damaged_checkpoint_of_a_series_is_left_out_and_told(folder, tmp_path):
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    shard = run / "global_step8" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:1000])
    found = call(run, "--data", folder / "mixture.yaml", "--out", tmp_path / "out", "--json")
    told = json.loads(found.stdout)
    assert found.exit_code == 0 and [row["step"] for row in told["checkpoints"]] == [4, 10]
    assert "global_step8" in told["left_out"][0]["checkpoint"] and "damaged" in told["left_out"][0]["reason"]


def test_bad_input_ends_with_status_2_and_the_cure(folder, done, tmp_path):
    step, data = folder / "run" / "global_step4", folder / "mixture.yaml"
    other = tmp_path / "other.yaml"
    other.write_text(data.read_text().replace("english:", "danish:"))
    long = {"--out": tmp_path / "x", "--data": data}
    cases = [
        ({**long, "--data": other}, "the run's own mixture file"),
        ({**long, "--samples": 7}, "write 8"),
        ({**long, "--samples": 4096}, "or less"),
        ({**long, "--target": "danish=1"}, "no such domain"),
        ({**long, "--target": "english"}, "NAME=SHARE"),
        ({**long, "--out": folder / "run"}, "record of a run"),
        ({**long, "--out": step}, "another folder"),
        ({**long, "--out": done[1], "--metric": "identity"}, "other settings"),
        ({**long, "--train-iters": 5}, "budgets sum"),
    ]
    for options, cure in cases:
        found = call(step, *(word for pair in options.items() for word in pair))
        assert found.exit_code == 2 and cure in found.output, (cure, found.output)
    found = call("--data", data, "--out", tmp_path / "x")
    assert found.exit_code == 2 and "name a checkpoint" in found.output


def test_data_of_another_vocabulary_is_refused(folder, tmp_path):
    for path in folder.glob("*_train.*"):
        shutil.copy(path, tmp_path)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text((folder / "mixture.yaml").read_text().replace(str(folder), str(tmp_path)))
    raw = np.fromfile(tmp_path / "code_train.bin", dtype=np.uint16)
    (raw + 1000).astype(np.uint16).tofile(tmp_path / "code_train.bin")
    words = (folder / "run" / "global_step4", "--data", mixture, "--out", tmp_path / "out")
    found = call(*words)
    assert found.exit_code == 2 and "outside the vocabulary of 256" in found.output
    (tmp_path / "code_train.json").write_text('{"tokenizer": "abc", "vocab_size": 512}')
    found = call(*words)
    assert found.exit_code == 2 and "vocabulary of 512" in found.output


def test_each_target_is_reported(folder, tmp_path):
    place = (folder / "run" / "global_step4", "--data", folder / "mixture.yaml", "--out", tmp_path)
    told = json.loads(call(*place, "--target", "each", "--json").stdout)
    assert [one["target"] for one in told["checkpoints"][0]["targets"]] == list(jobs.DOMAINS)


@pytest.mark.parametrize("error, pairs", [(0.1, [["b", "a"]]), (5.0, [])])
def test_the_pairs_told_improvable_name_the_earlier_one_first(error, pairs):
    plan = types.SimpleNamespace(names=("a", "b"), minimum=np.zeros(2), maximum=np.ones(2))
    gap = [[0.0, 2 * error], [2 * error, 0.0]]
    line = {"score": [3.0, -3.0], "gap_se": gap, "weights": [0.5, 0.5]}  # score of a above zero: delay it
    assert checkpoint_results.improvable(line, plan, 4, 0.95) == [pairs]
