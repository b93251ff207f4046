"""From a checkpoint to the measure.model.Model of one process: the whole model in float32, with
second moments.
"""

import dataclasses
import functools
import types

import torch

from megatron_commute.adapters import fused, megatron_core, torch_loop, twice_differentiable
from megatron_commute.checkpoints.files import CheckpointError, reading


class LoadedModel:
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
        with reading(checkpoint.folder):
            self.module = megatron_core.gpt_model(flags, self.vocabulary)
        if checkpoint.tanh:
            for module in self.module.modules():
                if hasattr(module, "activation_func"):
                    module.activation_func = openai_gelu
        if checkpoint.turned:
            angles = self.module.rotary_pos_emb.forward
            self.module.rotary_pos_emb.forward = lambda *given, **named: angles(*given, **named).cos()
        self.load(checkpoint)

    def load(self, checkpoint):
        """Take over weights and moments; CheckpointError where they are of another architecture."""
        own = dict(self.module.named_parameters())
        given = checkpoint.parameters
        for name in sorted(own.keys() ^ given.keys()):
            side = "lacks" if name in own else "has, beyond its flags,"
            raise CheckpointError(
                f"{checkpoint.folder}: {side} {name}: it is of another architecture than its flags say; "
                "analyse checkpoints of one run, or correct --arguments"
            )
        for name, p in own.items():
            if p.shape != given[name].shape:
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} has shape {tuple(given[name].shape)}, its flags say "
                    f"{tuple(p.shape)}: it is of another architecture; analyse checkpoints of one run, or "
                    "correct --arguments"
                )
            if not torch.isfinite(torch.linalg.vector_norm(given[name], 1)):
                raise CheckpointError(
                    f"{checkpoint.folder}: {name} is not finite; the run had diverged, leave the checkpoint "
                    "out"
                )
            moment = None if checkpoint.moments is None else checkpoint.moments.get(name, p[:0])
            if moment is not None and (moment.shape != p.shape or not bool((moment >= 0).all())):
                raise CheckpointError(
                    f"{checkpoint.folder}: the second moments of {name} have shape {tuple(moment.shape)} or "
                    "negative numbers; copy its optimiser states again, or write --metric identity"
                )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(given[name])
        self.moments = None
        if checkpoint.moments is not None:
            self.moments = [checkpoint.moments[name].to(own[name].device) for name in own]
        self.checkpoint = dataclasses.replace(checkpoint, parameters={}, moments=None)

    def probe_model(self, micro_batch, method):
        """The measure.model.Model of these weights; ValueError where `method` cannot work on it."""
        if method == "exact":
            twice_differentiable.refuse(self.module)
        decays = self.checkpoint.decays
        decayed = [decays.get(name, p.dim() > 1) for name, p in self.module.named_parameters()]
        model = torch_loop.probe_model(
            self.module,
            megatron_core.mean_loss,
            micro_batch,
            second_moments=lambda: self.moments,
            decayed=decayed,
            exact=lambda: twice_differentiable.twice_differentiable(self.module),
            verify=functools.partial(twice_differentiable.verify, self.module),
        )
        return fused.with_fused(model, self.module) if method == "fused" else model


def openai_gelu(x):
    """GELU by its tanh formula, under the name that Megatron gives it: the fused pass knows
    functions by their names.
    """
    return torch.nn.functional.gelu(x, approximate="tanh")
