"""Everything that travels between ranks: the only importer of torch.distributed.

A group of None, or of one rank, is the identity, so the same code runs in one process without a process group.
Vectors of model size travel only through `mean_of_vectors`; all else is a few numbers. Every collective and its
payload is counted in `traffic`, so that a test can state what a probe costs the network.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass
class Traffic:
    """What this process has sent through collectives since the last `reset`: calls and payload bytes."""

    calls: int = 0
    bytes: int = 0
    by_kind: dict = field(default_factory=dict)

    def add(self, kind, tensor):
        self.calls += 1
        self.bytes += tensor.numel() * tensor.element_size()
        calls, size = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = (calls + 1, size + tensor.numel() * tensor.element_size())

    def reset(self):
        self.calls, self.bytes, self.by_kind = 0, 0, {}


traffic = Traffic()


@dataclass(frozen=True)
class Groups:
    """The process groups of one model: `data` (replicas that see other samples), `model` (ranks that hold other
    parameters of the same replica), `world` (all of them). None stands for a single rank."""

    data: object = None
    model: object = None
    world: object = None

    @property
    def data_rank(self):
        return 0 if size(self.data) == 1 else dist.get_rank(self.data)


def everyone():
    """The group of all ranks, or None in a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size(group):
    return 1 if group is None else dist.get_world_size(group)


def _all_reduce(tensor, group, op, kind):
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    if size(group) > 1:
        traffic.add(kind, out)
        dist.all_reduce(out, op=op, group=group)
    return out


def all_reduce_sum(tensor, group):
    """Sum of `tensor` over `group`, as a new tensor."""
    return _all_reduce(tensor, group, dist.ReduceOp.SUM, "sum")


def all_reduce_max(tensor, group):
    """Element-wise maximum of `tensor` over `group`, as a new tensor."""
    return _all_reduce(tensor, group, dist.ReduceOp.MAX, "max")


def sum_of_vectors(vectors, group, bucket=2**25):
    """Sum vectors of model size (a list of tensors) over `group`, in place, in buckets of `bucket` elements."""
    if size(group) == 1 or not vectors:
        return vectors
    start = 0
    while start < len(vectors):
        stop, held = start, 0
        while stop < len(vectors) and (stop == start or held + vectors[stop].numel() <= bucket):
            held += vectors[stop].numel()
            stop += 1
        flat = torch.cat([v.reshape(-1) for v in vectors[start:stop]])
        traffic.add("vector", flat)
        dist.all_reduce(flat, group=group)
        for vector, piece in zip(vectors[start:stop], flat.split([v.numel() for v in vectors[start:stop]]), strict=True):
            vector.copy_(piece.view_as(vector))
        start = stop
    return vectors


def any_rank(flag, groups):
    """Whether `flag` holds on any rank: the vote, one number over the world group."""
    device = "cuda" if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    return bool(all_reduce_max(torch.tensor([float(bool(flag))], device=device), groups.world).item() > 0)


def broadcast_text(text, groups):
    """The string held by the world's first rank, on every rank (bitwise equal)."""
    if size(groups.world) == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0, group=groups.world)
    return box[0]
