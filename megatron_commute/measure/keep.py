"""Where a probe keeps its vectors: beside the parameters, or in the memory of the host.

In the host's memory arithmetic is done there too, one layer after the other, so that a layer at
most is in flight; what the device holds are displaced parameters and their gradient. Pinned where
the parameters are on a GPU. On a CPU both are the same memory, and the same numbers.
"""

import numpy as np
import torch

from megatron_commute import ops, reduce

HOST = torch.device("cpu")


class Keep:
    """offload: whether vectors are in the host's memory."""

    def __init__(self, offload):
        self.offload = offload

    def zeros(self, params):
        """A new vector like `params`."""
        if not self.offload:
            return [torch.zeros_like(p) for p in params]
        return [torch.zeros(p.shape, dtype=p.dtype, device=HOST, pin_memory=p.is_cuda) for p in params]

    def taken(self, vector):
        """A vector of the model's, or None, where vectors are kept; the list given is emptied."""
        if vector is None or not self.offload:
            return vector
        taken = self.zeros(vector)
        for into in taken:
            into.copy_(vector.pop(0))
        return taken

    def copy(self, into, vector):
        """into = vector."""
        for i, v in zip(into, vector, strict=True):
            i.copy_(v)

    def add(self, into, vector, scale):
        """into += scale * vector."""
        if not self.offload:
            vector = [v.to(i.dtype) for i, v in zip(into, vector, strict=True)]
            torch._foreach_add_(into, vector, alpha=scale)
            return
        for i, v in zip(into, vector, strict=True):
            i.add_(v.to(i), alpha=scale)

    def displaced(self, params, vector, scale):
        """New tensors params + scale * vector, beside the parameters."""
        if not self.offload:
            return ops.displace(params, vector, scale)
        both = zip(params, vector, strict=True)
        return [ops.displace([p], [v.to(p.device)], scale)[0] for p, v in both]

    def sum_over(self, group, vector, params):
        """Sum a vector over a group, in place; it travels from where the parameters are."""
        if not self.offload:
            reduce.sum_of_vectors(vector, group)
            return
        for v, p in zip(vector, params, strict=True) if reduce.size(group) > 1 else ():
            v.copy_(reduce.sum_of_vectors([v.to(p.device, copy=True)], group)[0])

    def gram(self, X, Y, metric, indices):
        """Inner products over the tensors `indices`, float64 numpy [len(X), len(Y)]; zeros where
        there are none.
        """
        parts = [[i] for i in indices] if self.offload else [indices]
        found = np.zeros((len(X), len(Y)))
        for part in parts if indices else ():
            left, right, (along,) = (self._part(vectors, part) for vectors in (X, Y, [metric]))
            found += ops.gram(left, right, along).cpu().numpy()
        return found

    def _part(self, vectors, indices):
        """These tensors of some vectors, any of which may be None, in one place."""
        if not self.offload:
            return [None if v is None else [v[i] for i in indices] for v in vectors]
        return [None if v is None else [v[i].to(HOST) for i in indices] for v in vectors]

    def dot(self, a, b, indices):
        """Inner product of two vectors over the tensors `indices`."""
        return float(self.gram([a], [b], None, indices)[0, 0])
