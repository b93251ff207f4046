"""One model out of what tensor-parallel ranks hold, in the names and the layout of megatron-core's
GPTModel.
"""

import torch

from megatron_commute.checkpoints.files import CheckpointError

ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
GATED = ("linear_fc1.weight", "linear_fc1.bias")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def refuse_other_steps(states, where):
    """Raises CheckpointError where the model states of ranks [{key: value}] are of different
    steps.
    """
    for rank, state in enumerate(states):
        for key in ("iteration", "global_steps"):
            if state.get(key) != states[0].get(key):
                raise CheckpointError(
                    f"{where}: model states of rank {rank} are of step {state.get(key)}, those of rank 0 of "
                    f"step {states[0].get(key)}; parts of different checkpoints, copy the whole folder"
                )


def merged(ranks, gated, where):
    """{name: whole tensor, float32} of `ranks`, a list of {name: shard} in the order of
    tensor-parallel ranks.

    gated: whether the first layer of an MLP holds gate and value (SwiGLU), each rank a range of
    both. Norms, biases after a sum and positions are copies: the first rank's count. Raises
    CheckpointError, naming `where`, for ranks that do not fit.
    """
    for rank, held in enumerate(ranks):
        for name in ranks[0].keys() ^ held.keys():
            raise CheckpointError(
                f"{where}: tensor-parallel ranks 0 and {rank} do not both hold {name}; their files are of "
                "different checkpoints, copy the whole folder"
            )
    try:
        return {name: _whole(name, [held[name] for held in ranks], gated) for name in ranks[0]}
    except RuntimeError as fault:
        raise CheckpointError(
            f"{where}: the shards of its tensor-parallel ranks do not fit ({fault}); copy the whole folder"
        ) from None


def _whole(name, shards, gated):
    if len(shards) == 1:
        return shards[0].float()
    if name.endswith(COLUMNS):
        return torch.cat(shards, 1).float()
    if name.endswith(GATED) and gated:
        gates, values = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *values]).float()
    if name.endswith(ROWS + GATED):
        return torch.cat(shards).float()
    return shards[0].float()
