"""What a probe needs of a model, whoever trains it: the contract that adapters fulfil."""

import dataclasses
from typing import NamedTuple

import torch

FULL_PRECISION = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model as a probe sees it; adapters build it."""

    parameters: object
    # () -> float32 or float64 tensors at which to measure, one after the other for each trainable
    # parameter of this rank
    loss: object
    # (parameters, tokens i64[b, seq_length + 1]) -> mean loss in nats per token; writes to nothing
    owned: tuple
    # per parameter, False where another model-parallel rank holds the same values and counts them
    decayed: tuple
    # per parameter, whether the optimiser's decoupled weight decay acts on it
    metric: object
    # name -> diagonal D of the optimiser's flow as a list of tensors, or None: identity; collective
    quiet: object
    # (method) -> context manager: dropout off, random state kept, double backward for `exact`
    micro_batch: int
    # sequences of one forward pass
    verify: object = None
    # (parameters, tokens) -> None, raises where exact or fused is wrong here; cheap once passed
    low_precision: bool = False
    # whether `parameters` are float32 copies of what the module holds
    fused: object = None
    # (parameters, u, tokens) -> object with .gradient and .product (lists), for method fused
    gradient: object = None
    # (parameters, (tokens, share) pairs) -> sum of share * gradient, for models whose micro-batches
    # must run together (pipelines) or in lock-step with other ranks; None: one by one through
    # `loss`
    together: bool = False
    # whether vectors are this rank's SHARDS of what all data-parallel ranks add up; then `gradient`
    # is collective over them and gives shards of the sum over their batches
    shards: object = None
    # (reduce.Groups) -> Shards of this model, for probes that work together on vectors in shards;
    # None: there is no such way, or (ZeRO-3) no other


class Shards(NamedTuple):
    """What differs in a Model whose vectors lie in shards over the data-parallel ranks; its fields
    by the same names.
    """

    parameters: object
    gradient: object
    metric: object


def full_precision(tensors):
    """The tensors detached, one after the other; those in half precision as float32 copies."""
    return (t.detach() if t.dtype in FULL_PRECISION else t.detach().float() for t in tensors)


def low_precision(tensors):
    """Whether `full_precision` copies any of them."""
    return any(t.dtype not in FULL_PRECISION for t in tensors)


def in_shards(model, groups):
    """The same Model with its vectors in shards over the data-parallel ranks of `groups`."""
    if model.shards is None:
        return model
    return dataclasses.replace(model, together=True, shards=None, **model.shards(groups)._asdict())
