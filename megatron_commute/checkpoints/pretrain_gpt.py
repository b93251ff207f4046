"""Checkpoints of launch/pretrain_gpt.py: ZeRO 0 to 3 and tensor parallelism, names and flags as
they count here.
"""

import json
import types

from megatron_commute.checkpoints.checkpoint import ARCHITECTURE, Checkpoint
from megatron_commute.checkpoints.files import CheckpointError, load
from megatron_commute.checkpoints.parallel import merged, refuse_other_steps
from megatron_commute.checkpoints.zero import layout, rank_state


def wrote(files):
    """Whether checkpoints.files.Files are those of this trainer, not of Megatron-DeepSpeed."""
    if files.layers:
        return False
    state = load(next(iter((files.model or files.shards).values())))
    return not isinstance(state, dict) or "args" not in state


def read(folder, files, extra):
    """The Checkpoint in a folder of this trainer. extra: {flag: value} that count where the
    checkpoint says nothing.

    Raises CheckpointError for what is damaged or partial.
    """
    ranks = [rank_state(files, rank) for rank in sorted(files.model or {model for _, model in files.shards})]
    state = ranks[0].state
    refuse_other_steps([rank.state for rank in ranks], folder)
    if "iteration" not in state:
        raise CheckpointError(f"{folder}: says no iteration; it was not written by pretrain_gpt.py")
    arguments = json.loads(state["arguments"]) if state.get("arguments") else {}
    arguments = types.SimpleNamespace(**{**extra, **arguments})
    missing = [name for name in ARCHITECTURE if not hasattr(arguments, name)]
    if missing:
        raise CheckpointError(
            f"{folder}: does not say what model it holds ({', '.join(missing[:3])}, ...): it was written "
            "before checkpoints kept the flags; name them with --arguments FILE, a JSON object such as "
            '{"num_layers": 4, "num_attention_heads": 4, ...}'
        )
    moments = None
    if all(rank.moments is not None for rank in ranks):
        moments = merged([rank.moments for rank in ranks], arguments.swiglu, str(folder))
    return Checkpoint(
        folder=str(folder),
        iteration=state["iteration"],
        arguments=arguments,
        parameters=merged([rank.parameters for rank in ranks], arguments.swiglu, str(folder)),
        moments=moments,
        decays=ranks[0].decays,
        commute=json.loads(state["commute"]) if state.get("commute") else None,
        ranks=layout(files, len(ranks)),
    )
