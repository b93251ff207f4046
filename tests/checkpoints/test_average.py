"""The mean of checkpoints: every tensor against numpy's float64 mean, the hosts that load it, and what is refused."""

import json
import pickletools
import shutil
import zipfile
from pathlib import Path

import jobs
import numpy as np
import pytest
import ranks
import torch
from checkpoint_runs import EVERY, ITERS, digests, flags
from commands import invoke

from megatron_commute.checkpoints import average as means
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.checkpoints.readers import read

STEPS, SEQUENCE = (4, 8, 10), {"seq_length": 8, "global_batch_size": 8}
MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
GPT2 = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {
    "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


def flat(node, within=""):
    """{path: value} of every leaf of nested dicts, lists and tuples."""
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list | tuple):
        pairs = enumerate(node)
    else:
        return {within: node}
    return {name: leaf for key, value in pairs for name, leaf in flat(value, f"{within}/{key}").items()}


def stored(path):
    return flat(torch.load(path, map_location="cpu", weights_only=False))


def float64(tensor):
    return tensor.detach().to(torch.float64).numpy()


def globals_of(path):
    """The classes that a torch file names."""
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        found = {
            str(told) for code, told, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"
        }
    return {
        name for name in found if name.split()[0].partition(".")[0] in ("deepspeed", "megatron", "argparse")
    }


def judge(written, folders):
    """Every tensor of every torch file; the number of means."""
    names = {path.name for path in folders[-1].glob("*.pt")}
    assert names == {path.name for path in written.glob("*.pt")}
    count = 0
    for name in names:
        *_, last = given = [stored(folder / name) for folder in folders]
        found = stored(written / name)
        assert found.keys() == last.keys() and globals_of(written / name) == globals_of(folders[-1] / name)
        for place, value in found.items():
            parts = place.split("/")
            if parts[-1] in ("exp_avg", "exp_avg_sq", "step"):
                assert not np.any(float64(torch.as_tensor(value))), place
            elif torch.is_tensor(value) and (parts[1] == "module" or set(parts) & {*MASTERS}):
                expected = np.mean([float64(one[place]) for one in given], axis=0)
                assert np.array_equal(value.detach().numpy(), expected.astype(np.float32)), place
                assert value.requires_grad == last[place].requires_grad and type(value) is type(
                    last[place]
                ), place
                count += value.numel() > 0
            elif torch.is_tensor(value):
                assert torch.equal(value, last[place]), place
            elif isinstance(value, int | float | str | bool | None):
                assert value == last[place], place
    return count


@pytest.mark.parametrize("run", ["zero1", "zero3", "tensor", "run-stock"])
def test_every_tensor_of_the_trainers_layouts(folder, tmp_path, run):
    folders = [folder / run / f"global_step{step}" for step in STEPS]
    before = digests(folder / run)
    done = invoke("average", *folders, "--out", tmp_path / "mean", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    written = tmp_path / "mean" / "global_step10"
    assert told["checkpoint"] == str(written) and told["steps"] == [*STEPS]
    assert judge(written, folders) == told["tensors"] > 0
    assert digests(folder / run) == before
    # the readers of `analyze` see the mean of what they see in each
    mean, given = read(written).parameters, [read(path).parameters for path in folders]
    for name, tensor in mean.items():
        expected = np.mean([float64(one[name]) for one in given], axis=0)
        assert np.array_equal(tensor.detach().numpy(), expected.astype(np.float32)), name


@pytest.mark.parametrize(("run", "stage", "world"), [("zero3", 3, 2), ("run-stock", 0, 1)])
def test_the_trainer_goes_on_from_the_mean_with_a_fresh_optimiser(folder, tmp_path, run, stage, world):
    out, more = tmp_path / "mean", 1
    means.average(means.chosen([folder / run]), out, say=lambda line: None)
    argv = flags(
        folder,
        run,
        stage,
        "--load",
        out,
        "--save",
        tmp_path / "on",
        "--train-iters",
        ITERS + more,
        plugin=False,
    )
    ranks.run(jobs.train, world, [argv], timeout=120)
    place = tmp_path / "on" / f"global_step{ITERS + more}"
    found = (
        {**stored(next(place.glob("*optim_states.pt")))}
        if stage
        else stored(place / "mp_rank_00_model_states.pt")
    )
    assert {float(value) for name, value in found.items() if name.endswith("/step")} == {more}
    begun, ended, last = (
        read(path).parameters for path in (out / "global_step10", place, folder / run / "global_step10")
    )
    # a first step of Adam moves each weight by the rate, weight decay by a little more
    assert max(float((ended[name] - begun[name]).detach().abs().max()) for name in begun) <= 3.1e-3
    assert max(float((last[name] - begun[name]).detach().abs().max()) for name in begun) > 3.5e-3


def test_the_last_part_of_a_run(tmp_path):
    steps = [100, 850, 900, 950, 1000]
    for step in steps:
        (tmp_path / f"global_step{step}").mkdir()
    for last, begin in ((0.1, 900), (0.15, 850), (0.149, 900), (1.0, 100)):
        assert [step for step, _ in means.chosen([tmp_path], last)] == [
            step for step in steps if step >= begin
        ]
    with pytest.raises(CheckpointError, match="write a larger part"):
        means.chosen([tmp_path], 0.01)
    with pytest.raises(CheckpointError, match="name it alone"):
        means.chosen([tmp_path / "global_step900", tmp_path / "global_step950"], 0.5)


# --- Hugging Face -----------------------------------------------------------------------------------------


def model_of(config, seed, dtype=torch.float32):
    import transformers

    config = {**config, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    if "n_embd" in config:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model.to(dtype).eval()


def series_of(place, config, dtype=torch.float32, **how):
    """Checkpoints 2, 4 and 6 as Trainer leaves them; {step: state dict}."""
    kept = {}
    for step in (2, 4, 6):
        model, folder = model_of(config, step, dtype), place / f"checkpoint-{step}"
        model.save_pretrained(folder, **how)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 6}))
        kept[step] = model.state_dict()
    return kept


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("way", ["one", "shards", "bin", "bf16"])
def test_transformers_loads_the_mean(tmp_path, config, way):
    import transformers
    from safetensors.torch import load_file

    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    kept = series_of(
        tmp_path / "run", config, dtype, **({"max_shard_size": "20KB"} if way == "shards" else {})
    )
    for folder in (tmp_path / "run").iterdir():
        if way == "bin":
            torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        (folder / "model.onnx").write_text("of this checkpoint alone")
    before = digests(tmp_path / "run")
    done = invoke("average", tmp_path / "run", "--out", tmp_path / "mean", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["left_out"] == ["model.onnx"]
    assert digests(tmp_path / "run") == before
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "mean", output_loading_info=True, dtype=dtype
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for name, tensor in model.state_dict().items():
        expected = np.mean([float64(kept[step][name]) for step in kept], axis=0)
        if way == "bf16":  # half a unit of 8 bits, once
            assert np.all(np.abs(float64(tensor) - expected) <= np.abs(expected) * 2.0**-8 * (1 + 1e-6)), name
        else:
            assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
    assert read(tmp_path / "mean", SEQUENCE).iteration == 6


def test_model_folders_without_steps_come_as_named(tmp_path):
    models = [model_of(GPT2, seed) for seed in (1, 2)]
    for model, name in zip(models, "ab", strict=True):
        model.save_pretrained(tmp_path / name)
    assert invoke("average", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "mean").exit_code == 0
    found = read(tmp_path / "mean", SEQUENCE).parameters["decoder.final_layernorm.weight"]
    both = [float64(model.transformer.ln_f.weight) for model in models]
    assert np.array_equal(found.numpy(), np.mean(both, axis=0).astype(np.float32))


def test_trainer_goes_on_with_a_fresh_optimiser_and_the_schedule_of_the_last(tmp_path):
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    logging.disable_progress_bar()
    rows = torch.from_numpy(np.random.default_rng(0).integers(256, size=(64, 8)))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trainer(place, steps):
        asked = TrainingArguments(
            str(place), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, logging_strategy="no", lr_scheduler_type="constant_with_warmup",
            warmup_steps=8,
        )  # fmt: skip
        return Trainer(model_of(GPT2, 0), asked, train_dataset=data)

    trainer(tmp_path / "run", 4).train()
    assert invoke("average", tmp_path / "run", "--out", tmp_path / "mean").exit_code == 0
    again = trainer(tmp_path / "on", 5)
    again.train(resume_from_checkpoint=str(tmp_path / "mean"))
    assert again.state.global_step == 5
    optimizer = getattr(again.optimizer, "optimizer", again.optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert again.lr_scheduler.last_epoch == 5


def test_shards_of_trainer_under_deepspeed(tmp_path):
    places = [tmp_path / "run" / f"checkpoint-{step}" for step in (1, 2)]
    for step, place in enumerate(places, 1):
        made = tmp_path / str(step) / "checkpoint-1"
        ranks.run(jobs.under_deepspeed, 1, model_of(LLAMA, step), 3, made, timeout=120)
        place.parent.mkdir(exist_ok=True)
        made.rename(place)
        (place / "global_step1").rename(place / f"global_step{step}")
    assert invoke("average", tmp_path / "run", "--out", tmp_path / "mean").exit_code == 0
    (tmp_path / "mean" / "trainer_state.json").write_text('{"global_step": 2}')
    assert judge(
        tmp_path / "mean" / "global_step2", [place / f"global_step{place.name[-1]}" for place in places]
    )
    mean, *given = (read(place, SEQUENCE).parameters for place in (tmp_path / "mean", *places))
    for name, tensor in mean.items():
        expected = np.mean([float64(one[name]) for one in given], axis=0)
        np.testing.assert_allclose(float64(tensor), expected, rtol=1e-6, atol=1e-8)


# --- held-out losses --------------------------------------------------------------------------------------


def test_losses_are_those_of_transformers(folder, tmp_path):
    import transformers

    from megatron_commute.checkpoints.held_out import HeldOut
    from megatron_commute.checkpoints.setting import Asked
    from megatron_commute.data.indexed import drawer

    config = {**GPT2, "n_positions": jobs.SEQUENCE}
    series_of(tmp_path / "run", config)
    (tmp_path / "flags.json").write_text(json.dumps({"seq_length": jobs.SEQUENCE, "global_batch_size": 8}))
    asked = ("--train-iters", ITERS, "--samples", 4, "--arguments", tmp_path / "flags.json")
    words = (
        "average",
        tmp_path / "run",
        "--out",
        tmp_path / "mean",
        "--data",
        folder / "mixture.yaml",
        *asked,
    )
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["losses"]
    wanted = Asked(samples=4, train_iters=ITERS, arguments=str(tmp_path / "flags.json"))
    setting = HeldOut(checkpoint=tmp_path / "mean", data=folder / "mixture.yaml", wanted=wanted).setting
    draw = drawer(setting.config, setting.plan, jobs.SEQUENCE)
    for k, row in enumerate(rows):
        tokens, losses = draw("gradient", k, np.arange(4)), []
        for place in (tmp_path / "mean", tmp_path / "run" / "checkpoint-6"):
            with torch.no_grad():
                logits = transformers.AutoModelForCausalLM.from_pretrained(place)(tokens[:, :-1]).logits
            each = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
            losses.append(each.double().mean(1).numpy())
        apart = losses[0] - losses[1]
        expected = (losses[0].mean(), losses[1].mean(), apart.mean(), apart.std(ddof=1) / 2)
        assert (row["domain"], row["sequences"]) == (setting.plan.names[k], 4)
        found = [row[key] for key in ("mean", "last", "difference", "standard_error")]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert "held-out loss" in invoke(*words[:3], tmp_path / "other", *words[4:]).stdout


# --- refusals ---------------------------------------------------------------------------------------------


def refused(out, *words):
    """The one line of a refusal, which leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    done = invoke("average", *words, "--out", out)
    assert done.exit_code == 2 and sorted(out.parent.iterdir()) == before, done.output
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.splitlines()[-1] == line
    return line


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the ZeRO-1 run that a test may damage."""
    return Path(shutil.copytree(folder / "zero1", tmp_path / "run"))


def test_folders_that_cannot_be_averaged(folder, copied, tmp_path):
    out, one, two = tmp_path / "mean", copied / f"global_step{EVERY}", copied / "global_step8"
    assert "name two or more" in refused(out, one, one)
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(out, tmp_path / "empty", one)
    assert "average checkpoints of one layout" in refused(out, one, folder / "zero3" / "global_step8")
    assert "need --data" in refused(out, copied, "--samples", 4)
    out.mkdir()
    assert "is there already" in refused(out, copied)
    assert "lies in a checkpoint" in refused(one / "mean", one, two)
    shutil.rmtree(two)
    two.mkdir()
    assert "no model states" in refused(tmp_path / "new", one, two)


def test_tensors_that_cannot_be_averaged(copied, tmp_path):
    path, out = copied / "global_step8" / "mp_rank_00_model_states.pt", tmp_path / "mean"
    whole = torch.load(path, weights_only=False)
    name, *_ = whole["module"]
    kept = whole["module"][name]
    for other, match in (
        (kept[:-1], "shape|is \\("),
        (kept.double(), "float64"),
        (None, "none"),
        (torch.full_like(kept, float("nan")), "is not finite"),
    ):
        module = {key: other if key == name else value for key, value in whole["module"].items()}
        torch.save({**whole, "module": module}, path)
        line = refused(out, copied)
        assert name in line and "global_step8" in line
        assert any(part.replace("\\", "") in line for part in match.split("|"))
    torch.save(whole, path)
    shard = copied / "global_step10" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    states = torch.load(shard, weights_only=False)
    states["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["z"] = torch.ones(7)
    torch.save(states, shard)
    assert "whose beginning is not known" in refused(out, copied)


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("adapter_config.json", None, "adapter"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantised"),
        ("config.json", {}, "no weights in it"),
    ],
)
def test_hugging_face_folders_that_cannot_be_averaged(tmp_path, file, text, match):
    for step in (2, 4):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / file).write_text(json.dumps(text or {}))
    assert match in refused(tmp_path / "mean", tmp_path / "run")
