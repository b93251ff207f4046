"""The metric of Adam's flow from its second moments."""

from typing import NamedTuple

import numpy as np
import torch

from megatron_commute import reduce

# D = 1/(sqrt(v) + floor): rows that are hardly ever visited have tiny v and would dominate every
# inner product; a floor of a tenth of the mean sqrt(v) bounds D at ten times its usual size.
METRIC_FLOOR = 0.1


class Summed(NamedTuple):
    """Second moments of which each is a sum over the ranks of a group, made when its turn comes."""

    moments: object
    # one tensor after the other
    group: object


def adam_metric(second_moments, owned, group):
    """D = 1 / (sqrt(v) + METRIC_FLOOR * mean sqrt(v)) per parameter, as a list.

    second_moments: () -> v, one tensor after the other, of which one is alive at a time where they
    are made on demand, or Summed; None: there are none. owned: which of them count in the mean.
    group: ranks that hold the other parameters, over which the mean runs too. Raises ValueError
    where the optimiser has no second moments (yet).
    """
    with reduce.agreed(group):
        moments, roots = second_moments() if second_moments is not None else None, []
        if moments is None:
            raise ValueError(
                "probe.metric adam needs an Adam optimiser that has taken a step; write `metric: identity`"
            )
        moments, adders = moments if isinstance(moments, Summed) else (moments, None)
        moments = iter(moments)
        for _ in owned:
            with reduce.agreed(adders):  # before its ranks take the next sum
                roots.append(next(moments).float().sqrt())
    counted = [(float(r.sum(dtype=torch.float64)), r.numel()) for r, o in zip(roots, owned, strict=True) if o]
    total, count = reduce.sum_of_numbers(np.array([(0.0, 0), *counted]).sum(0), group)
    floor = METRIC_FLOOR * total / count
    if not floor > 0:
        raise ValueError("all second moments of the optimiser are zero: probe after its first step")
    return [r.add_(floor).reciprocal_() for r in roots]
