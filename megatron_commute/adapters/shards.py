"""Vectors in shards over the data-parallel ranks, parameters whole one at a time: under every ZeRO
stage.

A probe's parameters are this rank's shards, displaced or not. While a loss is evaluated, every
access of a module to a parameter gives the whole tensor, gathered at that moment by a
differentiable operation whose adjoint is the scattered sum; what autograd keeps of it is only its
number, and backward gathers it again. So a gradient is made of shards of the sum over all ranks, at
the cost of two gathers and one scattered sum for each use of a parameter, and of model size nothing
is whole on any rank but what the host holds anyway. Rank-local faults are survived, since ranks
vote before each collective.
"""

import contextlib
import dataclasses
import math
import weakref

import torch

from megatron_commute import reduce
from megatron_commute.adapters.metric import Summed, adam_metric
from megatron_commute.measure.model import Shards, full_precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """How one parameter lies on the data-parallel ranks: equal ranges of its flat form, the last
    ones shorter.
    """

    shape: tuple
    # of the whole
    ranks: int
    rank: int
    # of this process among them
    part: object
    # () -> this rank's range, flat; a view
    device: torch.device
    # where it is used

    @property
    def length(self):
        """Numbers in a range, padding included."""
        return -(-math.prod(self.shape) // self.ranks)

    def of(self, whole):
        """This rank's range of a tensor of the whole shape, flat."""
        return whole.detach().reshape(-1)[self.length * self.rank : self.length * (self.rank + 1)]


def cut(param, group):
    """The Cut of a parameter that every rank of `group` holds whole."""
    shape, ranks, rank = tuple(param.shape), reduce.size(group), reduce.rank_in(group)
    made = Cut(shape=shape, ranks=ranks, rank=rank, part=lambda: made.of(param), device=param.device)
    return made


def of(params, owned, second_moments, groups, gradient):
    """The measure.model.Shards of `params`, those with a gradient, which every data-parallel rank
    holds whole.

    owned, second_moments: of them, as torch_loop.probe_model takes them; groups: reduce.Groups;
    gradient: {parameter: Cut} -> what Shards.gradient is to be.
    """
    cuts = {p: cut(p, groups.data) for p in params}

    def moments():
        found = second_moments() if second_moments is not None else None
        if found is None:
            return None
        wholes, group = found if isinstance(found, Summed) else (found, None)
        return Summed((c.of(whole) for c, whole in zip(cuts.values(), wholes, strict=True)), group)

    return Shards(
        parameters=lambda: full_precision(c.part() for c in cuts.values()),
        gradient=gradient(cuts),
        metric=lambda name: None if name == "identity" else adam_metric(moments, owned, groups.world),
    )


def gradient(module, loss, cuts, groups, rest=contextlib.nullcontext):
    """(at, batches) -> the `gradient` of measure.model.Model, collective over all ranks.

    loss: (module, tokens) -> mean loss, the same operations in the same order on every rank. cuts:
    {parameter: Cut}; those with a gradient come in the order of `at`. rest: () -> context manager
    around each micro-batch.
    """

    def of(at, batches):
        whole = Whole(cuts=cuts, at=at, group=groups.data, voters=groups.world)
        for tokens, share in batches:
            with whole.closing(), rest(), whole.instead_of_shards(module), torch.enable_grad():
                (loss(module, tokens) * share).backward(inputs=whole.leaves)
        return whole.gradients()

    return of


class Whole:
    """Whole parameters from shards, on access, for the time of one gradient.

    Before each collective ranks agree that none has failed; one that has failed says so at the next
    of its peers. cuts: as of `gradient`. at: shards, one for each parameter with a gradient.
    group: the ranks that hold the others. voters: those that vote, a group that `group` is part of.
    """

    def __init__(self, *, cuts, at, group, voters):
        self.cuts = {id(param): c for param, c in cuts.items()}
        self.leaves = [shard.detach().requires_grad_(True) for shard in at]
        sloped = [id(param) for param in cuts if param.requires_grad]
        self.shards = dict(zip(sloped, self.leaves, strict=True))
        self.group, self.voters, self.told, self.lent = group, voters, False, {}

    def gradients(self):
        """What backward has left in the leaves; zeros where nothing came."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.leaves]

    @contextlib.contextmanager
    def closing(self):
        """A piece of work with collectives, left alike by all ranks."""
        try:
            yield
        except Exception:
            if not self.told:
                reduce.any_rank(True, self.voters)
            raise
        self._vote()

    def _vote(self):
        self.told = reduce.any_rank(False, self.voters)
        if self.told:
            raise RuntimeError("another rank failed in its forward or backward pass")

    @contextlib.contextmanager
    def instead_of_shards(self, module):
        """Let `module` see whole parameters. Left as it was, whatever happens.

        Raises ValueError for recurrent modules of torch, which read their weights past it.
        """
        modules = list(module.modules())
        if any(isinstance(m, torch.nn.RNNBase) for m in modules):
            raise ValueError("recurrent layers of torch hold lists of weights: write `memory: full`")
        kept = [m.__dict__["_parameters"] for m in modules]
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            try:
                for m, own in zip(modules, kept, strict=True):
                    m.__dict__["_parameters"] = _OnAccess(own, self._of)
                yield
            finally:
                for m, own in zip(modules, kept, strict=True):
                    m.__dict__["_parameters"] = own

    def _of(self, param):
        """The whole of `param` as a tensor of the graph, gathered anew; itself where it is not
        cut.
        """
        key = id(param)
        if key not in self.cuts:
            return param
        own = self._own(key)
        whole = _Gather.apply(own, self, key) if key in self.shards else self.gathered(own, key)
        # what memory holds which parameter, as long as it lives
        self.lent[whole.untyped_storage().data_ptr()] = (weakref.ref(whole), key)
        return whole

    def _own(self, key):
        leaf = self.shards.get(key)
        return next(full_precision([self.cuts[key].part()])) if leaf is None else leaf

    def gathered(self, shard, key):
        """The whole parameter `key` from the shards of all ranks."""
        at = self.cuts[key]
        self._vote()
        own = shard.detach().to(at.device)
        if own.numel() < at.length:
            own = torch.cat([own, own.new_zeros(at.length - own.numel())])
        whole = reduce.gathered(own, self.group)
        return whole[: math.prod(at.shape)].view(at.shape)

    def scattered(self, slope, key):
        """This rank's shard of the sum of all ranks' `slope` of the parameter `key`."""
        at = self.cuts[key]
        self._vote()
        flat = slope.new_zeros(at.length * at.ranks)
        flat[: slope.numel()] = slope.reshape(-1)
        own = self.shards[key]
        return reduce.scattered_sum(flat, self.group)[: own.numel()].to(own.device, copy=True)

    def _pack(self, tensor):
        """What backward keeps of a tensor: of a parameter only which it is, and how it was looked
        at.
        """
        found = self.lent.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if found is None or found[0]() is None or found[0]().dtype != tensor.dtype:
            return tensor
        return found[1], tensor.size(), tensor.stride(), tensor.storage_offset()

    def _unpack(self, kept):
        if torch.is_tensor(kept):
            return kept
        key, *geometry = kept
        return self.gathered(self._own(key), key).as_strided(*geometry)


class _Gather(torch.autograd.Function):
    """A whole parameter from the shards of all ranks; backward: this rank's shard of the sum of all
    ranks' gradients.
    """

    @staticmethod
    def forward(ctx, shard, whole, key):
        ctx.whole, ctx.key = whole, key
        return whole.gathered(shard, key)

    @staticmethod
    def backward(ctx, slope):
        return ctx.whole.scattered(slope, ctx.key), None, None


class _OnAccess(dict):
    """The parameters of one module: reading one gives it whole. Listing them gives the shards'
    owners, untouched.
    """

    def __init__(self, own, whole_of):
        super().__init__(own.items())
        self.whole_of = whole_of

    def __getitem__(self, name):
        param = super().__getitem__(name)
        return param if param is None else self.whole_of(param)
