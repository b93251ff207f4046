"""Names of parameters as real checkpoints carry them: without the prefixes of what a model was
wrapped in.
"""

import re

import torch

from megatron_commute.checkpoints.files import CheckpointError

# of DistributedDataParallel and DeepSpeed, torch.compile, FSDP, activation checkpointing, Lightning
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
    r"|^module\."
)


def unwrapped(name, also=()):
    """`name` without the wrappers that may stand in it, and without any of `also` that leads it."""
    before = None
    while before != name:
        before = name
        name = _WRAPPERS.sub("", name)
        for prefix in also:
            name = name.removeprefix(prefix)
    return name


def bare(by_name, where, also=()):
    """{name without wrappers: value}. Raises CheckpointError, naming `where`, where two names are
    of one parameter and their values differ.
    """
    found, origin = {}, {}
    for name, value in by_name.items():
        short = unwrapped(str(name), also)
        if short in found and not _equal(found[short], value):
            raise CheckpointError(
                f"{where}: has {origin[short]} and {name}, which are one parameter and differ; save the "
                "model alone, without what it is wrapped in"
            )
        found[short], origin[short] = value, name
    return found


def _equal(one, other):
    if torch.is_tensor(one) and torch.is_tensor(other):
        return torch.equal(one, other)
    return one is other or (type(one) is type(other) and one == other)
