"""A run saved on two ranks goes on with four and with one, under every ZeRO stage; what cannot go on is refused."""

import json
import os
import shutil
import subprocess
import sys

import jobs
import numpy as np
import pytest
import ranks
import torch

from megatron_commute.adapters import restart
from megatron_commute.record import log as record

ITERS, SAVED, BATCH, MICRO = 20, 10, 8, 2
STAGES = (0, 1, 3)


def flags(folder, stage, run):
    """The trainer's command line; probes read whole parameters, so ZeRO 3 runs without the plug-in."""
    plugin = ["--commute", folder / "mixture.yaml"] if stage < 3 else []
    fixed = ["--save", run, "--load", run, "--save-interval", SAVED]
    fixed += ["--deepspeed_config", folder / f"zero{stage}.json"]
    return jobs.flags(folder, *plugin, *fixed, "--hidden-dropout", 0, "--attention-dropout", 0, iters=ITERS)


def in_order(results, run):
    """Losses f64[steps, batch] of every sample in the order of the global stream, from what each rank saw of one run."""
    place = np.arange(BATCH).reshape(-1, len(results), MICRO)
    steps = len(results[0][run]["losses"])
    losses = np.full((steps, BATCH), np.nan)
    for rank, seen in enumerate(results):
        losses[:, place[:, rank].reshape(-1)] = np.array(seen[run]["losses"])
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{stage: uninterrupted losses on two ranks} and {ranks: {stage: losses of the run that went on with them}}."""
    folder = tmp_path_factory.mktemp("elastic")
    jobs.write_data(folder)
    jobs.write_mixture(folder, mode="fixed", iters=ITERS, extra="probe: {samples: 16, splits: 4}")
    for stage in STAGES:
        config = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
        if stage == 3:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / f"zero{stage}.json").write_text(json.dumps(config))
    results = ranks.run(jobs.train, 2, [flags(folder, s, folder / f"whole{s}") for s in STAGES], timeout=500)
    whole = {stage: in_order(results, i) for i, stage in enumerate(STAGES)}
    for stage in STAGES:
        run = shutil.copytree(folder / f"whole{stage}", folder / f"1-{stage}")
        (run / "latest").write_text(f"global_step{SAVED}")
        shutil.rmtree(run / f"global_step{ITERS}")
        restart.choose(run, 1, 1, stage, convert=True)
        shutil.copytree(run, folder / f"4-{stage}")
    gone_on = {}
    for size in (1, 4):
        argvs = [flags(folder, stage, folder / f"{size}-{stage}") for stage in STAGES]
        results = ranks.run(jobs.train, size, argvs, timeout=500)
        gone_on[size] = {stage: in_order(results, i) for i, stage in enumerate(STAGES)}
    return folder, whole, gone_on


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_every_sample_has_the_loss_of_the_uninterrupted_run(runs, stage, size):
    """Up to the order of reductions; other moments would move losses by hundredths after a step."""
    _, whole, gone_on = runs
    assert whole[stage].shape == (ITERS, BATCH) and gone_on[size][stage].shape == (ITERS - SAVED, BATCH)
    np.testing.assert_allclose(gone_on[size][stage][0], whole[stage][SAVED], rtol=1e-5)
    np.testing.assert_allclose(gone_on[size][stage], whole[stage][SAVED:], rtol=1e-4)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("stage", STAGES[:2])
def test_the_record_is_that_of_the_uninterrupted_run(runs, stage, size):
    """Fingerprint (every sample's place, domain, position and content), what was served, weights, P."""
    folder, *_ = runs
    lines, expected = record.read(folder / f"{size}-{stage}"), record.read(folder / f"whole{stage}")
    assert [line["event"] for line in lines] == [line["event"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        same = {"step", "sample", "fingerprint", "served", "weights", "weights_next", "lr"}
        for key in same & other.keys():
            assert line[key] == other[key], key
        if line["event"] == "probe":
            P, M = np.array(line["P"]), np.array(other["M"])
            assert np.abs(P - np.array(other["P"])).max() <= 1e-3 * np.abs(M).max()
    assert lines[-1]["event"] == "end" and len({line.get("fingerprint") for line in lines}) > 3


def test_only_sharded_optimisers_are_converted_and_the_next_checkpoint_is_an_ordinary_one(runs):
    folder, *_ = runs
    for size in (1, 4):
        for stage in STAGES:
            run = folder / f"{size}-{stage}"
            assert (run / f"global_step{SAVED}_universal").exists() == (stage > 0)
            assert (run / "latest").read_text() == f"global_step{ITERS}"
            written = restart.saved(run / f"global_step{ITERS}")
            assert written == restart.Saved(size if stage else 0, 1, stage == 3)
            assert not list(run.glob(".*.given")) and not list(run.glob(".global*"))


@pytest.fixture
def checkpoint(runs, tmp_path):
    """A copy of the run under ZeRO 1 on two ranks, its newest checkpoint at step 10, without a universal form."""
    run = shutil.copytree(runs[0] / "whole1", tmp_path / "a run")
    (run / "latest").write_text(f"global_step{SAVED}")
    return run


def test_the_universal_form_follows_its_source(checkpoint):
    """Written once; again when the checkpoint of this step was written anew; never when nothing needs it."""
    said = []
    again = {"convert": True, "say": said.append}
    assert restart.choose(checkpoint, 2, 1, 1, **again) == restart.Choice("global_step10", False) and not said
    assert restart.choose(checkpoint, 1, 1, 2, **again) == restart.Choice("global_step10_universal", True)
    assert len(said) == 2
    universal = checkpoint / "global_step10_universal"
    model = "mp_rank_00_model_states.pt"
    kept = [torch.load(f / model, weights_only=False) for f in (checkpoint / "global_step10", universal)]
    assert kept[0]["commute"] and kept[0]["commute"] == kept[1]["commute"]
    assert kept[1]["iteration"] == SAVED
    restart.choose(checkpoint, 4, 1, 1, **again)
    assert len(said) == 2
    (universal / "stale").touch()
    (checkpoint / "global_step10" / model).touch()
    restart.choose(checkpoint, 4, 1, 1, **again)
    assert len(said) == 4 and not (universal / "stale").exists()


def refused(*arguments, **named):
    with pytest.raises(restart.RestartError) as told:
        restart.choose(*arguments, **named)
    return str(told.value)


def test_what_cannot_go_on_is_refused_with_the_cure(checkpoint):
    assert "write --tensor-model-parallel-size 1" in refused(checkpoint, 1, 2, 1)
    for stage in (0, 3):
        assert "written under ZeRO 1 or 2" in refused(checkpoint, 2, 1, stage)
    assert restart.choose(checkpoint, 2, 1, 2) == restart.Choice("global_step10", False)
    (checkpoint / "latest").write_text("global_step11")
    assert "no checkpoint here, though `latest` names it" in refused(checkpoint, 2, 1, 1)
    assert (
        restart.choose(None, 2, 1, 1)
        == restart.choose(checkpoint / "new", 2, 1, 1)
        == restart.Choice(None, False)
    )


@pytest.mark.parametrize("gone", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_shard_is_named_on_every_rank(runs, tmp_path, stage, gone):
    """Whichever is missing, the last too, which else looks like a checkpoint of fewer ranks; rank 0 converts nothing."""
    run = shutil.copytree(runs[0] / f"whole{stage}", tmp_path / "run")
    step = run / (run / "latest").read_text()
    names = [path.name for path in sorted(step.glob("*_optim_states.pt"))]
    for rank in gone:
        (step / names[rank]).rename(tmp_path / names[rank])
    for rank in range(2):
        said = []
        told = refused(run, 2, 1, stage, convert=rank == 0, say=said.append)
        assert (
            told.startswith(f"{step / names[gone[0]]}: is missing, 2 data-parallel ranks saved") and not said
        )
    for rank in gone:  # the cure
        shutil.copy(tmp_path / names[rank], step)
    assert restart.choose(run, 2, 1, stage).tag == step.name


def test_model_states_that_cannot_be_read_are_named(checkpoint):
    model = checkpoint / "global_step10" / "mp_rank_00_model_states.pt"
    for content in (b"", b"PK\x03\x04", model.read_bytes()[:5000]):
        model.write_bytes(content)
        assert f"{model}: cannot be read (" in refused(checkpoint, 2, 1, 1)


def test_a_conversion_that_fails_leaves_nothing_behind(checkpoint):
    shards = sorted((checkpoint / "global_step10").glob("*_optim_states.pt"))
    shards[1].write_bytes(b"cut short")
    before = sorted(checkpoint.iterdir())
    message = refused(checkpoint, 1, 1, 1, convert=True, say=lambda line: None)
    assert "ds_to_universal failed" in message and "start on the number of ranks that wrote it" in message
    assert sorted(checkpoint.iterdir()) == before


def test_two_jobs_do_not_write_into_one_folder(tmp_path):
    run = str(tmp_path / "run")
    code = f"from megatron_commute.adapters import restart\nwith restart.only_job({run!r}): pass"
    with restart.only_job(run):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "another job writes there" in done.stderr
    subprocess.run([sys.executable, "-c", code], check=True)


def locked(run):
    with pytest.raises(restart.RestartError) as told, restart.only_job(run):
        pass
    assert "\n" not in str(told.value) and f"--save {run}" in str(told.value)
    return str(told.value)


def test_a_lock_that_is_no_file_of_ours_is_refused_and_what_it_names_stays(tmp_path):
    run, stranger = tmp_path / "run", tmp_path / "stranger"
    run.mkdir()
    stranger.write_text("precious")
    lock = run / ".lock"
    for make in (lambda: lock.symlink_to(stranger), lock.mkdir, lambda: os.mkfifo(lock)):
        make()
        assert "remove its .lock" in locked(run)
        lock.rmdir() if lock.is_dir() else lock.unlink()  # the cure
        with restart.only_job(run):
            pass
        lock.unlink()
    assert stranger.read_text() == "precious"
    assert "is a file; name a folder" in locked(stranger) and stranger.read_text() == "precious"
    assert "name one that can be written to" in locked(stranger / "below")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfe\xff", "is no whole UTF-16 text"),
        (b"global_step\xe9", "is not UTF-8 text"),
        (b"", "names no checkpoint, an empty text"),
        (b"../elsewhere", "names no checkpoint, ../elsewhere"),
        (b"/etc", "names no checkpoint, /etc"),
        (b"..", "names no checkpoint"),
        (b"a\nb", r"names no checkpoint, a\nb"),
        (b"x" * 5000, "holds more than 4 KiB"),
        (b"global_step11", "no checkpoint here, though `latest` names it"),
    ],
)
def test_a_latest_that_names_no_checkpoint_of_the_folder_is_refused(tmp_path, content, told):
    (tmp_path / "latest").write_bytes(content)
    message = refused(tmp_path, 1, 1, 1)
    assert told in message and "\n" not in message and "; " in message
    known = r"resumes (at the beginning|from global_step11)"
    with pytest.raises(RuntimeError, match=known), restart.explained(3, 8, tmp_path):
        raise RuntimeError("NCCL timeout")


def test_a_latest_that_is_no_file_is_refused(tmp_path):
    latest = tmp_path / "latest"
    for make in (latest.mkdir, lambda: os.mkfifo(latest), lambda: latest.symlink_to("/dev/zero")):
        make()
        assert "write the name of a folder beside it" in refused(tmp_path, 1, 1, 1)
        latest.rmdir() if latest.is_dir() else latest.unlink()
    latest.write_bytes("global_step11\r\n".encode("utf-16"))  # a name all the same
    assert "global_step11: no checkpoint here" in refused(tmp_path, 1, 1, 1)


@pytest.mark.parametrize(
    "text", ["Connection closed by peer [127.0.0.1]:2", "Timed out waiting 60000ms for recv", "NCCL timeout"]
)
def test_a_lost_rank_is_explained_and_other_faults_are_not(tmp_path, text):
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(RuntimeError, match="rank 3 of 8") as told, restart.explained(3, 8, tmp_path):
        raise RuntimeError(text)
    assert "resumes from global_step7" in str(told.value) and str(told.value.__cause__) == text
    with pytest.raises(RuntimeError) as told, restart.explained(3, 8, None):
        raise RuntimeError("shapes differ")
    assert str(told.value) == "shapes differ"
