"""From a checkpoint to the Model of one process: the whole model in float32, with the optimiser's second moments."""

import contextlib
import json
import logging
import os
import tempfile
import types
from typing import NamedTuple

import torch

from megatron_commute.adapters import megatron_core, torch_loop
from megatron_commute.checkpoints import zero as checkpoint_zero
from megatron_commute.checkpoints.files import CheckpointError, files, hugging_face
from megatron_commute.checkpoints.parallel import merged
from megatron_commute.settings import rates

# what gpt_model asks of its flags
_ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length", "max_position_embeddings",
    "init_method_std", "normalization", "swiglu", "group_query_attention", "num_query_groups", "position_embedding_type",
    "untie_embeddings_and_output_weights", "disable_bias_linear",
)  # fmt: skip
# what it asks of them if they are there
_FINER = (
    "norm_epsilon", "kv_channels", "rotary_base", "rotary_seq_len_interpolation_factor", "use_rope_scaling",
    "rope_scaling_factor",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """One checkpoint as a single process would hold it. iteration: optimiser steps done; arguments: flags under Megatron's
    names; parameters, moments: {name: f32 tensor} under megatron-core's (moments bias-corrected, or None); decays: {name:
    bool}; commute: the plug-in's state, or None; ranks: what wrote it, in words; tanh: GELU by its tanh formula; turned:
    rotations by the cosines of the angles, as Megatron-DeepSpeed takes them.
    """

    folder: str
    iteration: int
    arguments: types.SimpleNamespace
    parameters: dict
    moments: dict | None
    decays: dict
    commute: dict | None
    ranks: str
    tanh: bool = False
    turned: bool = False

    @property
    def bytes(self):
        """Of parameters and moments."""
        vectors = [self.parameters, self.moments or {}]
        return sum(t.numel() * t.element_size() for vector in vectors for t in vector.values())


def read(folder, extra=None):
    """The Checkpoint in a folder that DeepSpeed or Hugging Face's libraries wrote. extra: {flag: value} that count where the
    checkpoint says nothing.

    Raises CheckpointError for what is damaged, partial or of an unknown kind.
    """
    if hugging_face(folder):
        from megatron_commute.checkpoints import hugging_face as checkpoint_hugging_face

        return checkpoint_hugging_face.read(folder, extra)
    found = files(folder)
    if found.layers or not _is_ours(found):
        from megatron_commute.checkpoints import megatron_deepspeed as checkpoint_megatron_deepspeed

        return checkpoint_megatron_deepspeed.read(folder, found)
    ranks = sorted(found.model or {model for _, model in found.shards})
    held = [checkpoint_zero.held(found, rank) for rank in ranks]
    state = held[0].state
    if "iteration" not in state:
        raise CheckpointError(f"{folder}: says no iteration; it was not written by pretrain_gpt.py")
    arguments = json.loads(state["arguments"]) if state.get("arguments") else {}
    arguments = types.SimpleNamespace(**{**(extra or {}), **arguments})
    missing = [name for name in _ARCHITECTURE if not hasattr(arguments, name)]
    if missing:
        raise CheckpointError(
            f"{folder}: does not say what model it holds ({', '.join(missing[:3])}, ...): it was written before checkpoints "
            "kept the flags; name them with --arguments FILE, a JSON object such as "
            '{"num_layers": 4, "num_attention_heads": 4, ...}'
        )
    gated, where = arguments.swiglu, str(folder)
    moments = None
    if all(h.moments is not None for h in held):
        moments = merged([h.moments for h in held], gated, where)
    commute = json.loads(state["commute"]) if state.get("commute") else None
    parameters = merged([h.parameters for h in held], gated, where)
    told = described(found, len(ranks))
    return Checkpoint(
        str(folder), state["iteration"], arguments, parameters, moments, held[0].decays, commute, told
    )


def _is_ours(found):
    from megatron_commute.checkpoints.files import load

    state = load(next(iter((found.model or found.shards).values())))
    return not isinstance(state, dict) or "args" not in state


def described(found, model):
    """What wrote checkpoint_files.Files of `model` model-parallel ranks, in words."""
    data = len({data for data, _ in found.optimizer})
    kind = "ZeRO 3" if found.shards else "ZeRO 1 or 2" if data else "no ZeRO"
    return f"{kind}, {data or 1} x {model} ranks"


def architecture(checkpoint):
    """What must be equal in a series, {flag: value}."""
    exact = {name: getattr(checkpoint.arguments, name) for name in _ARCHITECTURE}
    return {**exact, **{name: getattr(checkpoint.arguments, name, None) for name in _FINER}}


class Standing:
    """A GPTModel in this process that takes the weights of one checkpoint after the other."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint
        words = checkpoint.parameters.get("embedding.word_embeddings.weight")
        if words is None:
            raise CheckpointError(f"{checkpoint.folder}: holds no word embeddings; it is no GPT")
        self.vocabulary = len(words)
        plain = {
            "tensor_model_parallel_size": 1,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "bf16": False,
        }
        flags = types.SimpleNamespace(**{**vars(checkpoint.arguments), **plain})
        self.module = megatron_core.gpt_model(flags, self.vocabulary)
        if checkpoint.tanh:
            for module in self.module.modules():
                if hasattr(module, "activation_func"):
                    module.activation_func = openai_gelu
        if checkpoint.turned:
            angles = self.module.rotary_pos_emb.forward
            self.module.rotary_pos_emb.forward = lambda *given, **named: angles(*given, **named).cos()
        self.take(checkpoint)

    def take(self, checkpoint):
        """Hold the weights and moments of `checkpoint`. Raises CheckpointError where they are of another architecture."""
        own = dict(self.module.named_parameters())
        given = checkpoint.parameters
        for name in sorted(own.keys() ^ given.keys()):
            side = "lacks" if name in own else "has, beyond its flags,"
            raise CheckpointError(
                f"{checkpoint.folder}: {side} {name}: it is of another architecture than its flags say; analyse checkpoints "
                "of one run, or correct --arguments"
            )
        for name, p in own.items():
            if p.shape != given[name].shape:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} has shape {tuple(given[name].shape)}, its flags say {tuple(p.shape)}: it "
                    "is of another architecture; analyse checkpoints of one run, or correct --arguments"
                )
            if not torch.isfinite(torch.linalg.vector_norm(given[name], 1)):
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} is not finite; the run had diverged, leave the checkpoint out"
                )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(given[name])
        self.moments = None
        if checkpoint.moments is not None:
            self.moments = [checkpoint.moments[name].to(own[name].device) for name in own]
        self.checkpoint = checkpoint._replace(parameters={}, moments=None)

    def probe_model(self, micro_batch, method):
        """The Model of what is held; ValueError where `method` cannot work on it."""
        from megatron_commute.adapters import fused
        from megatron_commute.adapters import twice_differentiable as twice

        if method == "exact":
            twice.refuse(self.module)
        decays = self.checkpoint.decays
        decayed = [decays.get(name, p.dim() > 1) for name, p in self.module.named_parameters()]
        model = torch_loop.probe_model(
            *(self.module, megatron_core.mean_loss, micro_batch, lambda: self.moments, None, decayed, None),
            lambda: twice.twice_differentiable(self.module),
            lambda *loss_params_square: twice.verify(self.module, *loss_params_square),
        )
        return fused.with_fused(model, self.module) if method == "fused" else model


def openai_gelu(x):
    """GELU by its tanh formula, under the name that Megatron gives it: the fused pass knows functions by their names."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def learning_rate(arguments, step):
    """Rate of step `step` (0-based) by the schedule of the flags; None where they say none."""
    values = vars(arguments)
    steps = values.get("train_iters") or values.get("lr_decay_iters")
    if not values.get("lr") or not steps:
        return None
    return rates.rate(rates.from_flags({**values, "train_iters": steps}), step)


@contextlib.contextmanager
def one_process():
    """megatron-core's process groups for a single process, taken down at the end; as it is where they stand already. The
    hosts' warnings about their own defaults are silent meanwhile."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("torch.utils.cpp_extension", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with megatron_core.quiet_import(), contextlib.ExitStack() as held:
        from megatron.core import parallel_state

        if not parallel_state.is_initialized():
            _start(parallel_state, held)
        yield


def _start(parallel_state, held):
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not deepspeed.comm.is_initialized():
        compiled = deepspeed.ops.__compatible_ops__
        before = compiled.get("deepspeed_shm_comm")
        compiled["deepspeed_shm_comm"] = False  # or it is built first, which takes minutes
        folder = held.enter_context(tempfile.TemporaryDirectory())
        where = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, **where)
        compiled["deepspeed_shm_comm"] = before
        held.callback(deepspeed.comm.destroy_process_group)
    megatron_core.initialise(1, 0)
    held.callback(parallel_state.destroy_model_parallel)
