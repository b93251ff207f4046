"""One checkpoint as a single process would hold it, whoever wrote it: what readers return and an
analysis works on.
"""

import dataclasses
import math
import types

from megatron_commute.checkpoints.files import CheckpointError, whole_step
from megatron_commute.mixture import Mixture
from megatron_commute.settings import rates

# what gpt_model asks of its flags
ARCHITECTURE = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
    "max_position_embeddings", "init_method_std", "normalization", "swiglu", "group_query_attention",
    "num_query_groups", "position_embedding_type", "untie_embeddings_and_output_weights",
    "disable_bias_linear",
)  # fmt: skip
COUNTS = (
    "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length",
    "max_position_embeddings",
)  # fmt: skip
OF_A_RUN = ("global_batch_size", "micro_batch_size", "train_iters", "vocab_size")
# flag: the values that gpt_model knows
WORDS = {
    "normalization": ("LayerNorm", "RMSNorm"), "swiglu": (False, True),
    "group_query_attention": (False, True), "position_embedding_type": ("learned_absolute", "rope"),
    "untie_embeddings_and_output_weights": (False, True), "disable_bias_linear": (False, True),
}  # fmt: skip
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


def check(checkpoint):
    """Raises CheckpointError for flags of no model, before one of their size is built, and for a
    plug-in state that this version does not read.
    """
    whole_step(checkpoint.iteration, checkpoint.folder)
    check_flags(checkpoint.arguments, checkpoint.folder)
    _check_sizes(checkpoint)
    _check_state(checkpoint)


def check_flags(flags, where):
    """Raises CheckpointError, naming `where`, for flags that no model has."""
    finer = [name for name in ("num_query_groups", "kv_channels") if getattr(flags, name, None) is not None]
    for name in [*COUNTS, *finer]:
        value, most = getattr(flags, name), 2**16 if name == "num_layers" else 2**31
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < most:
            raise CheckpointError(
                f"{where}: its flags say {name} {str(value)[:40]}, which no model has; leave the checkpoint "
                "out, or correct --arguments"
            )
    for name in OF_A_RUN:  # 0 and None say nothing
        value = getattr(flags, name, None)
        if (
            isinstance(value, bool)
            or not isinstance(value or 1, int | float)
            or not 0 <= (value or 1) < 2**63
        ):
            raise CheckpointError(
                f"{where}: its flags say {name} {str(value)[:40]}, which no run has; leave the checkpoint "
                "out, or correct --arguments"
            )
    for name in FINER:
        value = getattr(flags, name, None)
        truth = isinstance(value, bool) and name != "use_rope_scaling"
        if value is not None and (truth or not isinstance(value, int | float) or not 0 <= value < math.inf):
            raise CheckpointError(
                f"{where}: its flags say {name} {str(value)[:40]}, which is no number of a model; leave the "
                "checkpoint out, or correct --arguments"
            )
    for name, known in WORDS.items():
        if getattr(flags, name) not in known:
            raise CheckpointError(
                f"{where}: its flags say {name} {str(getattr(flags, name))[:40]}; the analysis reads "
                f"{' or '.join(map(str, known))}, correct --arguments"
            )


def _check_sizes(checkpoint):
    """The flags' sizes are those of the tensors, so that a model of any other is never built."""
    flags, held = checkpoint.arguments, checkpoint.parameters
    width, heads = flags.hidden_size, flags.num_attention_heads
    channels = getattr(flags, "kv_channels", None) or max(1, width // heads)
    groups = flags.num_query_groups if flags.group_query_attention else heads
    first = "decoder.layers.0"
    learned = flags.position_embedding_type == "learned_absolute"
    sizes = {
        ("embedding.word_embeddings.weight", 1): width,
        ("embedding.position_embeddings.weight", 0): flags.max_position_embeddings if learned else None,
        (f"{first}.self_attention.linear_qkv.weight", 0): (heads + 2 * groups) * channels,
        (f"{first}.mlp.linear_fc1.weight", 0): flags.ffn_hidden_size * (2 if flags.swiglu else 1),
    }
    last = f"decoder.layers.{flags.num_layers - 1}."
    if not any(name.startswith(last) for name in held):
        raise CheckpointError(
            f"{checkpoint.folder}: lacks {last}*: it is of another architecture than its flags say; analyse "
            "checkpoints of one run, or correct --arguments"
        )
    for (name, axis), size in sizes.items():
        shape = tuple(held[name].shape) if name in held else ()
        if size is not None and shape and (len(shape) != 2 or shape[axis] != size):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {shape}, its flags say {size} on axis {axis}: it is "
                "of another architecture; analyse checkpoints of one run, or correct --arguments"
            )


def _check_state(checkpoint):
    state, cure = checkpoint.commute, "analyse it with the version that wrote it, or leave it out"
    if state is None:
        return
    if not isinstance(state, dict) or not {"ledger", "mixture", "probes", "config"} <= state.keys():
        raise CheckpointError(f"{checkpoint.folder}: its state of the plug-in is of another version; {cure}")
    try:
        Mixture.from_state(state["mixture"])
        names, probes = state["ledger"]["names"], state["probes"]
        if not all(isinstance(name, str) for name in names) or probes != int(probes) or probes < 0:
            raise ValueError("it names no domains or no probes")
    except (ArithmeticError, LookupError, TypeError, ValueError) as fault:
        told = " ".join(str(fault).split())[:160]
        raise CheckpointError(
            f"{checkpoint.folder}: its state of the plug-in cannot be read ({told}); {cure}"
        ) from fault


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
