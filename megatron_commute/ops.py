"""Arithmetic on vectors of model size: inner products of many vectors at once, and displaced copies of
parameters.

A vector of model size is a list of tensors, one per parameter. These are the plain-torch references: sums
are accumulated in float64 whatever the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Elements of all vectors together that are held in float64 at a time: about one in 64 of a vector, so that the copies
# do not count beside the vectors themselves, within bounds that keep a CPU's cache and a GPU's kernels busy.
_CHUNK_SHARE, _LEAST_CHUNK, _CHUNK = 64, 1 << 18, 1 << 22


def gram(
    X: Sequence[Sequence[torch.Tensor]],
    Y: Sequence[Sequence[torch.Tensor]],
    metric: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Inner products M[k, m] = sum_i X[k]_i D_i Y[m]_i, float64 [K, M], on the device of the vectors.

    X: K vectors, Y: M vectors, each a list of tensors with the same shapes; metric: the diagonal D as such a
    list, or None for the identity. Sums run over the tensors of this rank alone: shards of a vector are
    summed by the caller. Raises ValueError when a list is empty or shapes differ.
    """
    if not X or not Y or not X[0]:
        raise ValueError("gram needs at least one vector on either side, each with at least one tensor")
    for name, vectors in (("X", X), ("Y", Y), ("metric", [] if metric is None else [metric])):
        for k, vector in enumerate(vectors):
            check_shapes(X[0], vector, f"X[0] and {name}[{k}]" if name != "metric" else "X[0] and metric")
    result = torch.zeros(len(X), len(Y), dtype=torch.float64, device=X[0][0].device)
    size = sum(tensor.numel() for tensor in X[0])
    chunk = max(1, min(max(size // _CHUNK_SHARE, _LEAST_CHUNK), _CHUNK) // (len(X) + len(Y)))
    for i, tensor in enumerate(X[0]):
        for begin in range(0, tensor.numel(), chunk):
            left = _rows(X, i, begin, chunk)
            if metric is not None:
                left *= _rows([metric], i, begin, chunk)
            result += left @ (left if Y is X and metric is None else _rows(Y, i, begin, chunk)).T
    return result


def displace(params: Sequence[torch.Tensor], v: Sequence[torch.Tensor], eps: float) -> list[torch.Tensor]:
    """New tensors params + eps v with the dtype of params; params are not touched and no graph is kept.

    params, v: lists of tensors with the same shapes. eps: a number. Raises ValueError when shapes differ.
    """
    check_shapes(params, v, "params and v")
    with torch.no_grad():
        return [torch.add(p, u.to(p.dtype), alpha=eps) for p, u in zip(params, v, strict=True)]


def check_shapes(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], names: str) -> None:
    """Raise ValueError naming the first tensor in which vectors a and b differ in number or shape."""
    if len(a) != len(b):
        raise ValueError(
            f"{names} have {len(a)} and {len(b)} tensors: give one tensor per parameter, in one order"
        )
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x.shape != y.shape:
            raise ValueError(f"{names} differ at tensor {i}: shapes {tuple(x.shape)} and {tuple(y.shape)}")


def _rows(vectors: Sequence[Sequence[torch.Tensor]], i: int, begin: int, chunk: int) -> torch.Tensor:
    """Elements begin.. of tensor i of every vector, float64 [len(vectors), <= chunk], a new tensor."""
    return torch.stack([v[i].detach().reshape(-1)[begin : begin + chunk].double() for v in vectors])
