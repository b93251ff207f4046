"""Everything that travels between ranks: the only importer of torch.distributed.

A group of None, or of one rank, is the identity, so the same code runs in one process without a
process group. Vectors of model size travel only through `sum_of_vectors` and `scattered_sum`,
parameters that are cut into shards through `gathered`, activations of pipelines through `send` and
`receive`; all else is a few numbers. Every message and its payload is counted in `traffic`, so that
a test can state what a probe costs the network.
"""

import contextlib
import datetime
import itertools
import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

WAIT = datetime.timedelta(minutes=30)  # the most that one rank may keep the others waiting in `joined`


@dataclass(kw_only=True)
class Traffic:
    """What this process has sent through collectives since the last `reset`."""

    by_kind: dict = field(default_factory=dict)
    # kind -> (calls, payload bytes)

    def add(self, kind, tensor):
        calls, size = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = (calls + 1, size + tensor.numel() * tensor.element_size())

    def reset(self):
        self.by_kind = {}


traffic = Traffic()


@dataclass(frozen=True)
class Groups:
    """The process groups of one model; None stands for a single rank."""

    data: object = None
    # replicas, which see other samples
    model: object = None
    # ranks that hold other parameters of the same replica
    world: object = None
    # all of them

    @property
    def data_rank(self):
        return rank_in(self.data)


@contextlib.contextmanager
def joined():
    """Inside, the ranks that a launcher has started (torchrun, deepspeed) form the world: nccl, a
    GPU for each by LOCAL_RANK, or gloo. Nothing happens in a single process and where they have met
    already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def everyone():
    """The group of all ranks, or None in a single process."""
    return (
        dist.group.WORLD
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        else None
    )


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_in(group):
    return 0 if size(group) == 1 else dist.get_rank(group)


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
    """Sum vectors of model size (a list of tensors) over `group`, in place, in buckets of `bucket`
    elements.
    """
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
        for vector, piece in zip(
            vectors[start:stop], flat.split([v.numel() for v in vectors[start:stop]]), strict=True
        ):
            vector.copy_(piece.view_as(vector))
        start = stop
    return vectors


def scattered_sum(flat, group):
    """This rank's part of the sum over `group` of a flat vector of equal length on every rank, a
    multiple of their number: the r-th of as many equal ranges. Overwrites `flat`; the result may be
    a view of it.
    """
    ranks = size(group)
    if ranks == 1:
        return flat
    length = flat.numel() // ranks
    traffic.add("scatter", flat)
    if _scatters(group):
        piece = flat.new_empty(length)
        dist.reduce_scatter_tensor(piece, flat, group=group)
        return piece
    dist.all_reduce(flat, group=group)
    return flat.narrow(0, rank_in(group) * length, length)


def _scatters(group):
    """gloo has reduce_scatter since torch 2.7 only, and there it copies its input and takes four
    times as long.
    """
    return dist.get_backend(group) == "nccl"


def gathered(shard, group):
    """The flat tensors of equal length of all ranks of `group`, one after the other, as a new flat
    tensor.
    """
    if size(group) == 1:
        return shard.detach().clone()
    whole = shard.new_empty(size(group) * shard.numel())
    traffic.add("gather", shard)
    dist.all_gather_into_tensor(whole, shard.detach(), group=group)
    return whole


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16,
           torch.uint8, torch.bool)  # fmt: skip
_MOST_TENSORS, _MOST_DIMENSIONS = 16, 8


def send(tensors, number, peer):
    """Start sending a message to global rank `peer`: `number`, for the order, and a list of
    tensors, or None for a fault.

    Returns what `wait` needs; the tensors may be freed meanwhile. Raises ValueError, before
    anything is sent, for more than 16 tensors, more than 8 dimensions or a dtype without a place in
    the table.
    """
    head = torch.zeros(2 + _MOST_TENSORS * (3 + _MOST_DIMENSIONS), dtype=torch.int64)
    head[0], head[1] = number, -1 if tensors is None else len(tensors)
    if len(tensors or ()) > _MOST_TENSORS or any(t.dim() > _MOST_DIMENSIONS for t in tensors or ()):
        raise ValueError(f"a message holds {_MOST_TENSORS} tensors of {_MOST_DIMENSIONS} dimensions at most")
    for row, tensor in zip(head[2:].view(_MOST_TENSORS, -1), tensors or (), strict=False):
        row[0], row[1], row[2] = _DTYPES.index(tensor.dtype), tensor.requires_grad, tensor.dim()
        row[3 : 3 + tensor.dim()] = torch.tensor(tensor.shape)
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors or () if t.numel()]
    pending = []
    for part in (head.to(_device()), *raw):
        traffic.add("send", part)
        pending.append((dist.isend(part, peer), part))
    return pending


def wait(pending):
    """Until all that `send` has started is delivered."""
    for work, _ in pending:
        work.wait()


def receive(peer, device):
    """(number, tensors) of the next message of global rank `peer`, or (number, None) for a fault
    there. Tensors that required a gradient on the other side are leaves that require one here.
    """
    head = torch.empty(2 + _MOST_TENSORS * (3 + _MOST_DIMENSIONS), dtype=torch.int64, device=_device())
    dist.recv(head, peer)
    head = head.cpu()
    number, count = head[:2].tolist()
    tensors = []
    for kind, sloped, dims, *shape in head[2:].view(_MOST_TENSORS, -1)[: max(count, 0)].tolist():
        tensor = torch.empty(shape[:dims], dtype=_DTYPES[kind], device=device)
        if tensor.numel():
            dist.recv(tensor.view(-1).view(torch.uint8), peer)
        tensors.append(tensor.requires_grad_(bool(sloped)))
    return number, None if count < 0 else tensors


def any_rank(flag, group):
    """Whether `flag` holds on any rank of `group`: the vote, one number."""
    if size(group) == 1:
        return bool(flag)
    return bool(all_reduce_max(torch.tensor([float(bool(flag))], device=_device()), group).item() > 0)


@contextlib.contextmanager
def agreed(group):
    """A section without collectives that all ranks of `group` leave alike: an exception on one ends
    it on all.
    """
    fault = None
    try:
        yield
    except Exception as raised:
        fault = raised
    if any_rank(fault is not None, group):
        raise fault or RuntimeError("another rank of its group failed in this section")


def sum_of_numbers(array, group):
    """Sum over `group` of a float64 numpy array, as a new array of the same shape."""
    if size(group) == 1:
        return array.copy()
    return all_reduce_sum(torch.from_numpy(array).to(_device()), group).cpu().numpy()


def max_of_numbers(array, group):
    """Element-wise maximum over `group` of a float64 numpy array, a new one of its shape."""
    if size(group) == 1:
        return array.copy()
    return all_reduce_max(torch.from_numpy(array).to(_device()), group).cpu().numpy()


def broadcast_numbers(array, groups):
    """The float64 numpy array of the world's first rank, bit for bit, on every rank."""
    if size(groups.world) == 1:
        return array.copy()
    out = torch.from_numpy(array.copy()).to(_device())
    traffic.add("broadcast", out)
    dist.broadcast(out, src=0, group=groups.world)
    return out.cpu().numpy()


def gather_text(text, groups, size_limit=480):
    """The texts of all ranks of the world, in order, each cut to `size_limit` bytes of UTF-8."""
    n = size(groups.world)
    if n == 1:
        return [text]
    raw = text.encode()[:size_limit].ljust(size_limit, b"\0")
    box = torch.tensor(list(raw), dtype=torch.uint8, device=_device())
    boxes = [torch.empty_like(box) for _ in range(n)]
    traffic.add("text", box)
    dist.all_gather(boxes, box, group=groups.world)
    return [bytes(b.tolist()).rstrip(b"\0").decode(errors="replace") for b in boxes]


@dataclass(frozen=True, kw_only=True)
class Team:
    """The data-parallel ranks that share one replicate of a probe."""

    splits: tuple
    # those that this rank works on, one a round
    rounds: int
    # the same on every rank
    group: object = None
    # None for a team of one
    rank: int = 0
    # of this process in its team
    size: int = 1
    # ranks of the team


def team(groups, splits, together=False):
    """Deal `splits` replicates over the data-parallel ranks: whole replicates to single ranks while
    there are at least as many splits as ranks, else one replicate to a team of neighbouring ranks.
    together: all ranks are one team and work on every replicate in turn. Collective: every rank
    calls it once.
    """
    ranks, own = size(groups.data), groups.data_rank
    if together:
        return Team(splits=tuple(range(splits)), rounds=splits, group=groups.data, rank=own, size=ranks)
    if ranks <= splits:
        return Team(splits=tuple(range(own, splits, ranks)), rounds=-(-splits // ranks))
    cuts = [ranks * i // splits for i in range(splits + 1)]
    mine = next(i for i in range(splits) if cuts[i] <= own < cuts[i + 1])
    lines = [None] * dist.get_world_size()
    dist.all_gather_object(lines, dist.get_process_group_ranks(groups.data))
    group = None
    for line in sorted({tuple(line) for line in lines}):
        for start, stop in itertools.pairwise(cuts):
            members = list(line[start:stop])
            made = dist.new_group(members) if len(members) > 1 else None
            group = made if dist.get_rank() in members else group
    members = cuts[mine + 1] - cuts[mine]
    return Team(splits=(mine,), rounds=1, group=group, rank=own - cuts[mine], size=members)


def _device():
    return (
        "cuda"
        if torch.cuda.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
        else "cpu"
    )
