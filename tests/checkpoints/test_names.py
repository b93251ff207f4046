"""Names that real checkpoints carry: prefixes, wrappers, ties. What is read computes what transformers computes."""

import pytest
import torch
import transformers

from megatron_commute.adapters import megatron_core
from megatron_commute.adapters.one_process import one_process
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.checkpoints.model import LoadedModel
from megatron_commute.checkpoints.names import unwrapped
from megatron_commute.checkpoints.readers import read

FLAGS = {"seq_length": 16, "global_batch_size": 8}
END = {"bos_token_id": 0, "eos_token_id": 0}
GPT2 = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **END}
LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **END,
}  # fmt: skip
WORDS = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}


def model_of(kind, tied):
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, tie_word_embeddings=tied)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied)).eval()


def within(name):
    """A name with the wrappers of a compiled, checkpointed and sharded block inside."""
    head, dot, rest = name.partition(".0.")
    return f"{head}.0._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.{rest}" if dot else name


NAMES = {
    "its own": lambda name: name,
    "base model": lambda name: name.removeprefix("transformer.").removeprefix("model."),
    "data-parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in parallel": lambda name: f"module._orig_mod.{name}",
    "parallel in compiled": lambda name: f"_orig_mod.module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning, compiled": lambda name: f"model._orig_mod.{name}",
    "DeepSpeed in Lightning": lambda name: f"_forward_module.module.{name}",
    "blocks": within,
}


def saved(model, folder, renamed):
    model.config.save_pretrained(folder)
    torch.save(renamed, folder / "pytorch_model.bin")


def losses(folder, tokens):
    with one_process():
        module = LoadedModel(read(folder, FLAGS)).module
        return megatron_core.token_losses(module, tokens[:, :-1], tokens[:, 1:]).detach()


def their_losses(model, tokens):
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").detach()


TIES = {
    "both": lambda names, words: names,
    "embeddings": lambda names, words: [name for name in names if name != "lm_head.weight"],
    "output": lambda names, words: [name for name in names if name != words],
}


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("ties", TIES)
def test_tied_weights_under_either_name_or_both(tmp_path, kind, ties):
    model = model_of(kind, tied=True)
    weights = model.state_dict()
    tokens = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = their_losses(model, tokens)
    kept = TIES[ties](list(weights), WORDS[kind])
    for way, renamed in NAMES.items():
        saved(model, tmp_path, {renamed(name): weights[name] for name in kept})
        torch.testing.assert_close(losses(tmp_path, tokens), expected, rtol=1e-5, atol=1e-6, msg=way)


@pytest.mark.parametrize("kind", WORDS)
def test_what_transformers_reads_of_the_same_file_is_what_is_read(tmp_path, kind):
    model = model_of(kind, tied=True)
    tokens = torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(1))
    weights = model.state_dict()
    saved(model, tmp_path, {name: weights[name] for name in weights if name != WORDS[kind]})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(losses(tmp_path, tokens), their_losses(theirs, tokens), rtol=1e-5, atol=1e-6)


def test_two_names_of_one_parameter_must_agree(tmp_path):
    model = model_of("gpt2", tied=True)
    weights = dict(model.state_dict())
    twice = {**weights, "module.transformer.ln_f.bias": weights["transformer.ln_f.bias"]}
    saved(model, tmp_path, twice)
    read(tmp_path, FLAGS)
    saved(model, tmp_path, {**twice, "module.transformer.ln_f.bias": torch.ones(16)})
    with pytest.raises(CheckpointError, match=r"has transformer\.ln_f\.bias and module\.transformer\.ln_f"):
        read(tmp_path, FLAGS)
    saved(model, tmp_path, {**weights, "lm_head.weight": torch.ones(64, 16)})
    with pytest.raises(
        CheckpointError, match=r"tied embeddings, lm_head\.weight and wte\.weight differ; write"
    ):
        read(tmp_path, FLAGS)
    saved(model_of("gpt2", tied=False), tmp_path, {**weights, "lm_head.weight": torch.ones(64, 16)})
    assert float(read(tmp_path, FLAGS).parameters["output_layer.weight"].mean()) == 1, (
        "the cure that was told"
    )


@pytest.mark.parametrize("way", NAMES)
def test_names_of_megatron_lose_their_wrappers_too(way):
    if way != "base model" and "Lightning" not in way.split(",")[0]:
        name = "language_model.encoder.layers.0.mlp.dense_4h_to_h.bias"
        assert unwrapped(NAMES[way](name)) == name
