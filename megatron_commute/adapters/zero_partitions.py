"""What DeepSpeed's optimisers hold under ZeRO 1 and 2, or without ZeRO: flat partitions of
parameters and of Adam's second moments.
"""

import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.adapters.metric import Summed


def of(engine):
    """(model parameters, this rank's flat float32 partition of them) per optimiser group; partition
    None without ZeRO.
    """
    optimizer = engine.optimizer
    for members, flat in (
        ("bit16_groups", "single_partition_of_fp32_groups"),  # ZeRO 1 and 2
        ("bf16_groups", "fp32_groups_flat_partition"),  # DeepSpeed's BF16_Optimizer
    ):
        if hasattr(optimizer, members):
            return list(zip(getattr(optimizer, members), getattr(optimizer, flat), strict=True))
    return [(group["params"], None) for group in optimizer.param_groups]


def second_moments(engine, params, groups):
    """Bias-corrected second moments of Adam, one per parameter and made one by one, as
    metric.adam_metric takes them; None before its first step. Under ZeRO each is a sum over the
    data-parallel ranks of `groups`: collective over all ranks.
    """
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if all(flat is None for _, flat in of(engine)):
        return torch_loop.second_moments(inner, params)
    with reduce.agreed(groups.world):
        kept = _own_moments(engine, inner)
    if reduce.any_rank(kept is None, groups.world):
        return None
    return Summed(_summed(params, kept, groups.data), groups.data)


def _summed(params, kept, group):
    """The whole second moments, one by one; a fault on one rank ends it on all, before a sum."""
    for p in params:
        with reduce.agreed(group):
            own = _whole(p, *kept[id(p)])
        yield reduce.sum_of_vectors([own], group)[0]


def _own_moments(engine, inner):
    """{id of a parameter: (second moments of its flat ZeRO partition here, their correction)}."""
    found = {}
    for (members, flat), group in zip(of(engine), inner.param_groups, strict=True):
        state = inner.state.get(flat, {})
        if "exp_avg_sq" not in state:
            return None
        correction = 1 - group["betas"][1] ** float(state["step"])
        found |= {id(p): (state["exp_avg_sq"], correction) for p in members}
    return found


def _whole(param, flat, correction):
    """A tensor like `param`: its part in the partition `flat`, over `correction`; else zeros."""
    found = torch.zeros_like(param, dtype=torch.float32)
    if param._hp_mapping is not None:
        here, there = param._hp_mapping.lp_fragment_address, param._hp_mapping.hp_fragment_address
        piece = flat.narrow(0, there.start, there.numel) / correction
        found.view(-1).narrow(0, here.start, here.numel).copy_(piece)
    return found
