"""Checkpoints of any layout as one model: merged shards, second moments, what is refused, what is never written."""

import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from checkpoint_runs import EVERY

from megatron_commute.checkpoints import analysis as checkpoints
from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints.checkpoint import learning_rate
from megatron_commute.checkpoints.files import CheckpointError


def measured(folder, name, out, method="exact"):
    """The probe line of an analysis of the checkpoint of step 4 of run `name`."""
    asked = checkpoints.asked(method=method, metric="adam")
    place = [folder / name / f"global_step{EVERY}"]
    checkpoints.analyze(place, folder / "mixture.yaml", out, asked, say=lambda line: None)
    lines = [json.loads(line) for line in (out / "commute.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["event"] == "probe")


@pytest.mark.parametrize(
    ("name", "single"),
    [("zero1", "run"), ("zero3", "run-stock"), ("tensor", "run"), ("tensor-rich", "run-rich")],
)
def test_a_checkpoint_of_two_ranks_measures_what_the_single_process_one_does(folder, tmp_path, name, single):
    """The weights differ by what Adam makes of the order of reductions; a shard in a wrong place moves P by as much as M."""
    one, two = (np.array(measured(folder, n, tmp_path / n)["P"]) for n in (single, name))
    scale = np.abs(measured(folder, single, tmp_path / single)["M"]).max()
    assert np.abs(one).max() > 1e-3 * scale
    assert np.abs(one - two).max() <= 1e-4 * scale


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Evil()}, path)
    with pytest.raises(CheckpointError, match="harmless"):
        checkpoint_files.load(path)
    path.write_bytes(pickle.dumps({"module": Evil()}))
    with pytest.raises(CheckpointError):
        checkpoint_files.load(path)
    assert not (tmp_path / "ran").exists()


def test_the_learning_rate_is_the_trainers():
    trainer = jobs.trainer()
    kept = {"lr": 3e-3, "min_lr": 1e-4, "lr_warmup_iters": 4, "train_iters": 40}
    for way in ({}, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "linear"}):
        args = types.SimpleNamespace(**kept, **way)
        for step in range(45):
            assert learning_rate(args)(step) == trainer.learning_rate(args, step)
    assert learning_rate(types.SimpleNamespace(train_iters=40)) is None


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the ZeRO-1 run that a test may damage."""
    return Path(shutil.copytree(folder / "zero1", tmp_path / "run"))


def refused(folder, place, out, match, **asked):
    with pytest.raises(ValueError, match=match) as told:
        wanted = checkpoints.asked(**asked)
        checkpoints.analyze([place], folder / "mixture.yaml", out, wanted, say=lambda line: None)
    return str(told.value)


def test_partial_and_damaged_checkpoints_are_named(folder, copied, tmp_path):
    step, out = copied / f"global_step{EVERY}", tmp_path / "out"
    shard = step / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert shard.name in refused(folder, step, out, "damaged or cut off")
    shard.unlink()
    refused(folder, step, out, "incomplete|missing")
    shard.write_bytes(whole)
    (step / "mp_rank_00_model_states.pt").unlink()
    refused(folder, step, out, "no model states")
    refused(folder, tmp_path / "nowhere", out, "no such folder")
    (tmp_path / "empty").mkdir()
    refused(folder, tmp_path / "empty", out, "holds no checkpoint")


def test_flags_that_name_another_model_are_told_from_the_weights(folder, copied, tmp_path):
    step = copied / f"global_step{EVERY}"
    path = step / "mp_rank_00_model_states.pt"
    state = torch.load(path, weights_only=True)
    kept = json.loads(state["arguments"])
    for change, match in (
        ({"ffn_hidden_size": 64}, "another architecture"),
        ({"num_layers": 3}, "lacks decoder.layers.2"),
    ):
        torch.save({**state, "arguments": json.dumps(kept | change)}, path)
        refused(folder, step, tmp_path / "out", match)
    torch.save({name: value for name, value in state.items() if name != "arguments"}, path)
    refused(folder, step, tmp_path / "out", "--arguments FILE")
    flags_file = tmp_path / "flags.json"
    flags_file.write_text(json.dumps(kept))
    wanted = checkpoints.asked(arguments=str(flags_file))
    checkpoints.analyze([step], folder / "mixture.yaml", tmp_path / "out", wanted, say=lambda line: None)


@pytest.mark.megatron_deepspeed
@pytest.mark.skipif("MEGATRON_DEEPSPEED" not in os.environ, reason="MEGATRON_DEEPSPEED names no checkout")
def test_megatron_deepspeed_in_every_layout(tmp_path):
    """Learning rate 0, so that all layouts hold the same weights; P equals the single run's and each run's own probe."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "megatron_deepspeed"))
    import agreement
    import layouts
    import matrix

    _, tree = matrix.trees(tmp_path)
    data, names = matrix.prepare(tmp_path), ("single", "tp2", "pp2", "zero0", "zero3")
    extra = "probe: {samples: 8, splits: 2, method: difference, metric: adam}"
    file = Path(jobs.write_mixture(str(data), "m.yaml", mode="shadow", iters=4, batch=8, extra=extra))
    file.write_text(file.read_text().replace("every: 8", "every: 2"))
    planned = {}
    for name in names:
        more = (*agreement.STILL, "--commute", file, "--save-interval", "2")
        argv = layouts.flags(name, data, tmp_path / name / "save", *more, iters=4)
        job = {"script": f"{tree}/pretrain_gpt.py", "argv": argv, "ranks": layouts.LAYOUTS[name].ranks}
        planned[name] = {**job, "out": str(tmp_path / name), "seeded": True}
    matrix.run(tmp_path, planned)
    found = {}
    for name in names:
        run, lines = tmp_path / name / "save", []
        for method, metric in (("exact", "identity"), ("exact", "adam"), ("difference", "adam")):
            out = tmp_path / "out" / f"{name}-{method}-{metric}"
            asked = checkpoints.asked(method=method, metric=metric)
            checkpoints.analyze([run / "global_step2"], file, out, asked, say=lambda line: None)
            text = (out / "commute.jsonl").read_text().splitlines()
            lines.append(next(line for line in map(json.loads, text) if line["event"] == "probe"))
        found[name] = lines
        live = [json.loads(line) for line in (run / "commute.jsonl").read_text().splitlines()]
        live = next(line for line in live if line["event"] == "probe" and line["step"] == 2)
        scale = np.abs(live["M"]).max()
        assert np.abs(np.array(lines[2]["P"]) - live["P"]).max() <= 3e-4 * scale, name  # both by differences
    for name in names[1:]:
        for one, two in list(zip(found["single"], found[name], strict=True))[: 1 if name == "zero3" else 2]:
            away = np.abs(np.array(one["P"]) - np.array(two["P"])).max()
            assert away <= 1e-5 * np.abs(one["M"]).max(), name
