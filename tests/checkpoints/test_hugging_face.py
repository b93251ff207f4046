"""Hugging Face folders: losses, gradients and second moments are those of transformers itself, and what is refused."""

import contextlib
import copy
import json
import pickle
import re
import shutil
import sys
import types
from pathlib import Path

import jobs
import numpy as np
import pytest
import ranks
import torch
from checkpoint_runs import call, digests, probes

from megatron_commute.adapters import megatron_core
from megatron_commute.adapters.one_process import one_process
from megatron_commute.checkpoints import analysis as checkpoints
from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints import hugging_face as hugging_face
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.checkpoints.model import LoadedModel
from megatron_commute.checkpoints.readers import read

GPT2 = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
LLAMA = {
    "vocab_size": 256, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16384,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES = {
    "gpt2": GPT2,
    "gpt2-other": {**GPT2, "layer_norm_epsilon": 0.1, "activation_function": "gelu", "tie_word_embeddings": False},
    "gpt2-wide": {**GPT2, "n_inner": 20, "activation_function": "gelu_pytorch_tanh"},
    "llama": LLAMA,
    "llama-rich": {
        **LLAMA, "head_dim": 6, "rms_norm_eps": 0.1, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "llama-linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
    "llama-3": {**LLAMA, "num_key_value_heads": 4, "head_dim": 8, "rope_parameters": LLAMA3},
}  # fmt: skip
STEPS, BATCH, FLAGS = 4, 8, {"seq_length": jobs.SEQUENCE, "global_batch_size": 8, "lr": 1e-2}


@pytest.fixture(scope="module", autouse=True)
def process():
    from transformers.utils import logging

    logging.disable_progress_bar()
    with one_process():
        yield


def model_of(config):
    """A model of transformers with every parameter away from its initial zeros and ones."""
    import transformers

    config = {**config, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    if "n_embd" in config:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.2)
    return model


def their_losses(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").mean(1)


def laid_out(model, vectors, folder):
    """Vectors like the model's parameters in our layout: saved as weights, they are read like weights."""
    with torch.no_grad():
        for p, vector in zip(model.parameters(), vectors, strict=True):
            p.copy_(vector)
        model.save_pretrained(folder)
    return read(folder, FLAGS).parameters


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_transformers(name, tmp_path):
    model = model_of(CASES[name])
    model.save_pretrained(tmp_path)
    found = read(tmp_path, FLAGS)
    assert found.iteration == 0 and found.moments is None
    tokens = torch.randint(256, (5, jobs.SEQUENCE + 1))
    with one_process():  # without megatron-core's warnings
        module = LoadedModel(found).module
        ours = megatron_core.token_losses(module, tokens[:, :-1], tokens[:, 1:]).mean(1)
        ours.mean().backward()
    theirs, double = their_losses(model, tokens), copy.deepcopy(model).double()
    theirs.mean().backward()
    their_losses(double, tokens).mean().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    both = zip(model.parameters(), double.parameters(), strict=True)
    rounding = max(float((one.grad - two.grad).abs().max()) for one, two in both)  # of float32, theirs
    gradients = laid_out(model, [p.grad for p in model.parameters()], tmp_path)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=8 * rounding, msg=name)


def test_rotations_as_transformers_4_wrote_them():
    said = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    four = {**LLAMA, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": said}
    five = {**LLAMA, "model_type": "llama", "rope_parameters": LLAMA3}
    assert hugging_face.models.model_flags(four, ".") == hugging_face.models.model_flags(five, ".")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of transformers' own Trainer: {kind: (folder of checkpoint-2 and checkpoint-4, model, optimiser)}."""
    from transformers import Trainer, TrainingArguments

    rows = torch.from_numpy(np.random.default_rng(0).integers(256, size=(STEPS * BATCH, jobs.SEQUENCE)))
    data = [{"input_ids": row, "labels": row} for row in rows]
    found = {}
    for kind in ("gpt2", "llama"):
        folder = tmp_path_factory.mktemp(kind)
        settings = TrainingArguments(
            str(folder), max_steps=STEPS, save_steps=2, per_device_train_batch_size=BATCH // 2, report_to=[], use_cpu=True,
            gradient_accumulation_steps=2, disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model_of(CASES[kind]), settings, train_dataset=data)
        with contextlib.redirect_stdout(None):
            trainer.train()
            trainer.save_model()
        found[kind] = folder, trainer.model, trainer.optimizer
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_second_moments_are_those_of_the_optimiser(trained, kind, tmp_path):
    folder, model, optimizer = trained[kind]
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    found = read(folder / f"checkpoint-{STEPS}", FLAGS)
    assert found.iteration == STEPS and found.arguments.train_iters == STEPS
    assert found.arguments.weight_decay == 0.1 and found.arguments.micro_batch_size == BATCH // 2
    states = [optimizer.state[p] for p in model.parameters()]
    assert {float(state["step"]) for state in states} == {STEPS}
    expected = laid_out(model, [state["exp_avg_sq"] / (1 - 0.999**STEPS) for state in states], tmp_path)
    assert found.moments.keys() == expected.keys()
    for name, moment in found.moments.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-6, atol=0, msg=name)
    decayed = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    matrices = [p for p in model.parameters() if decayed[id(p)]]
    assert all(p.dim() > 1 for p in matrices) and len(matrices) < len(decayed)
    assert all(found.decays[name] == (p.dim() > 1) for name, p in found.parameters.items())


def of_torch(folder, shards):
    """Weights of a folder again as pytorch_model.bin, or as two shards of it with their index."""
    weights = hugging_face._tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not shards:
        return torch.save(weights, folder / "pytorch_model.bin")
    where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(weights)}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in weights if where[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def test_every_way_of_storing_weights_reads_the_same(tmp_path):
    model = model_of(GPT2)
    model.save_pretrained(tmp_path / "one")
    expected = read(tmp_path / "one", FLAGS).parameters
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.transformer.save_pretrained(tmp_path / "base")  # names without `transformer.`
    for name in ("bin", "bins"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        of_torch(tmp_path / name, shards=name == "bins")
    weights = torch.load(tmp_path / "bin" / "pytorch_model.bin")
    more = {"lm_head.weight": weights["transformer.wte.weight"], "h.0.attn.bias": torch.ones(1, 1, 32, 32)}
    torch.save(weights | more, tmp_path / "bin" / "pytorch_model.bin")  # as of earlier releases
    for name in ("shards", "base", "bin", "bins"):
        found = read(tmp_path / name, FLAGS).parameters
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


@pytest.mark.parametrize("stage", [1, 3])
def test_trainer_under_deepspeed(stage, tmp_path):
    """Its ZeRO shards lie beside, under the model's names. A process of its own: stage 3 leaves torch's layers patched."""
    place = tmp_path / "checkpoint-1"
    moments, weights = ranks.run(jobs.under_deepspeed, 1, model_of(LLAMA), stage, place, timeout=120)[0]
    found = read(place, FLAGS)
    assert found.iteration == 1
    for given, vectors in ((found.moments, moments), (found.parameters, weights)):
        expected = laid_out(model_of(LLAMA), vectors, tmp_path / "expected")
        assert given.keys() == expected.keys()
        for name, vector in given.items():
            torch.testing.assert_close(vector, expected[name], rtol=1e-6, atol=0, msg=name)


@pytest.fixture
def copied(trained, tmp_path):
    """copied(kind): a checkpoint-2 that a test may damage."""
    return lambda kind: Path(shutil.copytree(trained[kind][0] / "checkpoint-2", tmp_path / "checkpoint-2"))


def refused(place, match, extra=FLAGS):
    with pytest.raises(CheckpointError, match=match):
        read(place, extra)


def changed(folder, file, **keys):
    path = folder / file
    found = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


REFUSED = {
    "model_type bloom": ("gpt2", {"model_type": "bloom"}),
    "scale_attn_by_inverse_layer_idx True": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "activation_function relu": ("gpt2", {"activation_function": "relu"}),
    "quantization_config": ("gpt2", {"quantization_config": {"load_in_4bit": True}}),
    "lacks 'n_head'": ("gpt2", {"n_head": None}),
    "vocabulary of 300": ("gpt2", {"vocab_size": 300}),
    "lack h.2": ("gpt2", {"n_layer": 3}),
    "lack lm_head.weight": ("gpt2", {"tie_word_embeddings": False}),
    "hidden_act gelu": ("llama", {"hidden_act": "gelu"}),
    "attention_bias True, mlp_bias False": ("llama", {"attention_bias": True}),
    "'rope_type': 'yarn'": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}),
    "'type': 'dynamic'": ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}),
    "do not fit config.json": ("llama", {"num_key_value_heads": 3}),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_by_name(trained, told, copied):
    kind, keys = REFUSED[told]
    place = copied(kind)
    changed(place, "config.json", **keys)
    refused(place, re.escape(told))


def test_damage_and_missing_pieces_are_named(copied, tmp_path, monkeypatch):
    place = copied("gpt2")
    refused(place, "seq_length and global_batch_size; .*--arguments FILE.*4 here", None)
    refused(place, "seq_length 64.*write 32 or less", FLAGS | {"seq_length": 64})
    refused(place, "vocab_size 257.*write 256 or less", FLAGS | {"vocab_size": 257})
    weights, state = place / "model.safetensors", place / "trainer_state.json"
    whole, said = weights.read_bytes(), state.read_text()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "safetensors", None)
        refused(place, "pip install safetensors")
    weights.write_bytes(whole[:-8])
    refused(place, "model.safetensors: damaged or cut off")
    weights.unlink()
    refused(place, "no weights in it")
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(types.SimpleNamespace()))
    refused(place, "pytorch_model.bin: ")  # and is found after any safetensors, so it may stay
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../a.safetensors"}}')
    refused(place, f"{place}/a.safetensors: is missing")
    weights.write_bytes(whole)
    changed(place, "trainer_state.json", global_step=3)
    refused(place, "says step 3, its name 2")
    state.write_text(said[:40])
    refused(place, "trainer_state.json: damaged")
    state.write_text(said)
    (place / "optimizer.pt").write_bytes((place / "optimizer.pt").read_bytes()[:500])
    refused(place, "optimizer.pt: damaged or cut off")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "merge_and_unload")


def test_second_moments_in_an_unknown_order_are_not_guessed(copied):
    place = copied("gpt2")
    stored = torch.load(place / "optimizer.pt")
    groups = stored["param_groups"]
    one = {**groups[0], "params": groups[0]["params"] + groups[1]["params"]}  # another order of shapes
    for other in (
        {"state": stored["state"], "param_groups": [one]},
        {"state": {}, "param_groups": groups},
        {},
    ):
        torch.save(other, place / "optimizer.pt")
        assert read(place, FLAGS).moments is None


def test_a_series_is_found_and_a_model_folder_stands_alone(trained, tmp_path):
    folder = trained["gpt2"][0]
    found = checkpoint_files.series([folder])  # the final model lies beside them
    assert [step for step, _ in found] == [2, 4]
    plain = Path(shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("checkpoint-*")))
    assert checkpoint_files.series([plain], 7) == [(7, plain)]
    assert read(plain, FLAGS | {"iteration": 7}).iteration == 7
    shutil.copy(folder / "checkpoint-4" / "trainer_state.json", plain)
    assert checkpoint_files.series([plain]) == [(4, plain)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A mixture file for runs of STEPS steps, and beside it the flags that no Hugging Face folder says."""
    folder = tmp_path_factory.mktemp("data")
    jobs.write_data(folder)
    extra = "probe: {samples: 8, splits: 2, method: exact, metric: adam}"
    mixture = jobs.write_mixture(folder, mode="fixed", iters=STEPS, batch=BATCH, extra=extra)
    (folder / "flags.json").write_text(json.dumps(FLAGS))
    return mixture, folder / "flags.json"


def test_a_series_is_analysed_like_our_own_checkpoints_and_not_touched(trained, data, tmp_path):
    """Weights, moments and rates are those of the optimiser, as above; the probes that follow are those of test_analyze."""
    folder, (mixture, flags) = trained["llama"][0], data
    before, asked = digests(folder), checkpoints.asked(arguments=flags)
    checkpoints.analyze([folder], mixture, tmp_path, asked, say=lambda line: None)
    found = probes(tmp_path)
    assert digests(folder) == before and [*found] == [2, 4]
    assert all(np.abs(line["P"]).max() > 1e-3 * np.abs(line["M"]).max() > 0 for line in found.values())
    # Trainer's default schedule: linear to zero, after steps 2 and 4 of 4
    assert [line["lr"] for line in found.values()] == pytest.approx([0.5e-2, 0.0])


def test_what_is_missing_is_asked_for_at_the_command_line(trained, data, tmp_path):
    """A plain model folder has no optimiser, no length of its run and no rate."""
    plain, flags = tmp_path / "plain", tmp_path / "flags.json"
    shutil.copytree(trained["gpt2"][0], plain, ignore=shutil.ignore_patterns("checkpoint-*"))
    flags.write_text(json.dumps({name: FLAGS[name] for name in ("seq_length", "global_batch_size")}))
    words = (plain, "--data", data[0], "--out", tmp_path / "out", "--arguments", flags, "--method", "fused")
    long = ("--train-iters", STEPS)
    for more, told in (
        ((), "--train-iters"),
        (long, "--metric identity"),
        ((*long, "--metric", "identity"), "nothing names the learning rate"),
    ):
        found = call(*words, *more)
        assert told in found.output and found.exit_code == (0 if "identity" in more else 2), found.output
    assert [*probes(tmp_path / "out")] == [0]
    summary = Path(data[0]).with_name("code_train.json")
    summary.write_text('{"tokenizer": "abc", "vocab_size": 250}')
    found = call(*words, *long)
    summary.unlink()
    assert found.exit_code == 2 and "name vocab_size with --arguments" in found.output
