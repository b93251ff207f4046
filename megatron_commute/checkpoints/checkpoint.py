"""One checkpoint as a single process would hold it, whoever wrote it: what readers return and an
analysis works on.
"""

import dataclasses
import types

from megatron_commute.settings import rates

# what gpt_model asks of its flags
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
    "max_position_embeddings", "init_method_std", "normalization", "swiglu", "group_query_attention",
    "num_query_groups", "position_embedding_type", "untie_embeddings_and_output_weights",
    "disable_bias_linear",
)  # fmt: skip
# what it asks of them if they are there
FINER = (
    "norm_epsilon", "kv_channels", "rotary_base", "rotary_seq_len_interpolation_factor", "use_rope_scaling",
    "rope_scaling_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights, optimiser state and flags of a model after some steps, whole and in float32."""

    folder: str
    # where it lies
    iteration: int
    # optimiser steps done
    arguments: types.SimpleNamespace
    # flags under Megatron's names
    parameters: dict
    # {name: f32 tensor} under the names of megatron-core's GPTModel
    moments: dict | None
    # second moments of Adam likewise, bias-corrected; None where there are none
    decays: dict
    # {name: whether weight decay acts}
    commute: dict | None
    # the plug-in's state, or None for a run without it
    ranks: str
    # what wrote it, in words
    tanh: bool = False
    # whether GELU is its tanh formula
    turned: bool = False
    # whether rotations are by the cosines of the angles, as Megatron-DeepSpeed takes them

    @property
    def bytes(self):
        """Of parameters and moments."""
        vectors = [self.parameters, self.moments or {}]
        return sum(t.numel() * t.element_size() for vector in vectors for t in vector.values())


def architecture(checkpoint):
    """What must be equal in a series, {flag: value}."""
    exact = {name: getattr(checkpoint.arguments, name) for name in ARCHITECTURE}
    return {**exact, **{name: getattr(checkpoint.arguments, name, None) for name in FINER}}


def learning_rate(arguments):
    """step (0-based) -> rate by the schedule of the flags; None where they say none."""
    values = vars(arguments)
    steps = values.get("train_iters") or values.get("lr_decay_iters")
    if not values.get("lr") or not steps:
        return None
    schedule = rates.from_flags({**values, "train_iters": steps})
    return lambda step: rates.rate(schedule, step)
