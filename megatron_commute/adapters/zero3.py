"""ZeRO-3: gradients of a model whose parameters are cut into shards over the data-parallel ranks,
without the engine.

A probe's parameters are this rank's shards, displaced or not. While a loss is evaluated, every
access of a module to a parameter gives the whole tensor, gathered at that moment by a
differentiable operation whose adjoint is the scattered sum; what autograd keeps of it is only its
number, and backward gathers it again. So a gradient is made of shards of the sum over all ranks, at
the cost of two gathers and one scattered sum for each use of a parameter. DeepSpeed's own hooks
rest meanwhile: its parameters, prefetch trace, gradient partitions, counters and overflow flags
take no part. Rank-local faults are survived, since ranks vote before each collective.
"""

import contextlib
import weakref

import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure.model import Model, full_precision, low_precision


def probe_model(engine, loss, micro_batch, owned=None, groups=None, quiet=None):
    """The Model of a DeepSpeedEngine of ZeRO stage 3; method difference only.

    loss: (module, tokens i64[b, n]) -> mean loss, calling module(...) as training does, with the
    same operations in the same order on every rank. micro_batch: sequences a forward pass. owned:
    per trainable parameter, False where another model-parallel rank holds the same values and
    counts them. groups: reduce.Groups, default all ranks data-parallel. quiet: () -> context
    manager around the work, beside dropout off. bf16 parameters are read and measured as float32.

    Raises ValueError for quantised, secondary (hpZ, MiCS) or NVMe shards, and where ranks do not
    match the shards.
    """
    module = engine.module
    here = groups or reduce.Groups(reduce.everyone(), None, reduce.everyone())
    everything = list(module.parameters())
    _refuse(engine, everything, here)
    params = [p for p in everything if p.requires_grad]
    counted = tuple(owned or [True] * len(params))

    def parameters():
        return full_precision(_shard(p) for p in params)

    def gradient(at, batches):
        leaves = [p.detach().requires_grad_(True) for p in at]
        vote = _Vote(here.world)
        whole = _Whole(
            params=everything,
            leaves=dict(zip(map(id, params), leaves, strict=True)),
            group=here.data,
            vote=vote,
        )
        for tokens, share in batches:
            with vote.closing(), whole.instead_of_shards(module), torch.enable_grad():
                (loss(module, tokens) * share).backward(inputs=leaves)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]

    @contextlib.contextmanager
    def silent(method):
        with torch_loop.quiet(module), quiet() if quiet is not None else contextlib.nullcontext():
            yield

    def metric(name):
        if name == "identity":
            return None
        return torch_loop.adam_metric(
            lambda: second_moments(engine, params), counted, reduce.Groups(None, here.world, here.world)
        )

    return Model(
        parameters=parameters,
        loss=None,
        owned=counted,
        decayed=decayed(engine, params),
        metric=metric,
        quiet=silent,
        micro_batch=micro_batch,
        low_precision=low_precision(everything),
        gradient=gradient,
        together=True,
    )


def _refuse(engine, params, groups):
    if any(not hasattr(p, "ds_tensor") for p in params):
        raise ValueError("these parameters are not partitioned: this is no engine of ZeRO stage 3")
    if any(hasattr(p.ds_tensor, "ds_quant_scale") for p in params):
        raise ValueError("quantised weights cannot be displaced: switch zero_quantized_weights off")
    if any(getattr(p, "ds_secondary_tensor", None) is not None for p in params):
        raise ValueError("secondary shards are not supported: set zero_hpz_partition_size to 1")
    if any(str(getattr(p.ds_tensor, "final_location", None)) == "nvme" for p in params):
        raise ValueError(
            "shards on NVMe are not in memory when a probe reads them: offload parameters to cpu"
        )
    for p in params:
        if _ranks(p) != reduce.size(groups.data):
            raise ValueError(
                f"parameters are cut over {_ranks(p)} ranks, data-parallel ranks are "
                f"{reduce.size(groups.data)}: MiCS and expert parallelism are not supported"
            )


def _ranks(param):
    return reduce.size(param.ds_process_group)


def _shard(param):
    """This rank's part of a parameter, flat, without the padding; a view."""
    length = -(-param.ds_numel // _ranks(param))
    begin = min(length * reduce.rank_in(param.ds_process_group), param.ds_numel)
    return param.ds_tensor.detach().narrow(0, 0, min(length, param.ds_numel - begin))


def decayed(engine, params):
    """Per parameter, whether the optimiser's weight decay acts on it."""
    optimizer, decay = engine.optimizer, {}
    for i, members in enumerate(optimizer.fp16_groups):
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[i]]
        decay |= {id(p): bool(group.get("weight_decay")) for p in members}
    return tuple(decay[id(p)] for p in params)


def second_moments(engine, params):
    """Bias-corrected second moments of Adam, this rank's shards; None before its first step or
    without them.
    """
    optimizer, moments = engine.optimizer, []
    for p in params:
        i, _, _ = optimizer.grad_position[optimizer.get_param_id(p)]
        state = optimizer.optimizer.state.get(optimizer.fp32_partitioned_groups_flat[i], {})
        if "exp_avg_sq" not in state or not float(state.get("step", 0)):
            return None
        beta = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[i]]["betas"][1]
        shard = optimizer.get_local_fp32_param(p, "exp_avg_sq").narrow(0, 0, _shard(p).numel())
        moments.append(shard / (1 - beta ** float(state["step"])))
    return moments


class _Vote:
    """Before each collective ranks agree that none has failed; one that has failed says so at the
    next of its peers.
    """

    def __init__(self, group):
        self.group, self.told = group, False

    def before(self):
        self.told = reduce.any_rank(False, self.group)
        if self.told:
            raise RuntimeError("another rank failed in its forward or backward pass")

    @contextlib.contextmanager
    def closing(self):
        """A micro-batch, left alike by all ranks."""
        try:
            yield
        except Exception:
            if not self.told:
                reduce.any_rank(True, self.group)
            raise
        self.before()


class _Whole:
    """Whole parameters from shards, on access."""

    def __init__(self, *, params, leaves, group, vote):
        self.params, self.leaves = {id(p): p for p in params}, leaves
        self.group, self.vote, self.lent = group, vote, {}

    @contextlib.contextmanager
    def instead_of_shards(self, module):
        """Let `module` see whole parameters, and let DeepSpeed's hooks rest. Left as it was,
        whatever happens.
        """
        modules = list(module.modules())
        kept = [m.__dict__["_parameters"] for m in modules]
        with _without_hooks(modules), torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            try:
                for m, own in zip(modules, kept, strict=True):
                    m.__dict__["_parameters"] = _OnAccess(own, self.of)
                yield
            finally:
                for m, own in zip(modules, kept, strict=True):
                    m.__dict__["_parameters"] = own

    def of(self, param):
        """The whole of `param` as a tensor of the graph, gathered anew."""
        key, own = id(param), self._own(id(param))
        whole = _Gather.apply(own, self, key) if key in self.leaves else self._gathered(own, key)
        # what memory holds which parameter, as long as it lives
        self.lent[whole.untyped_storage().data_ptr()] = (weakref.ref(whole), key)
        return whole

    def _own(self, key):
        leaf = self.leaves.get(key)
        return full_precision([_shard(self.params[key])])[0] if leaf is None else leaf

    def _gathered(self, shard, key):
        param = self.params[key]
        self.vote.before()
        padded = shard.new_zeros(-(-param.ds_numel // _ranks(param)))
        padded[: shard.numel()] = shard.detach()
        if param.device.type == "cuda":
            padded = padded.to(param.device)
        whole = reduce.gathered(padded, self.group)
        return whole[: param.ds_numel].view(param.ds_shape)

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
        whole = self._gathered(self._own(key), key)
        return whole.as_strided(*geometry)


class _Gather(torch.autograd.Function):
    """A whole parameter from the shards of all ranks; backward: this rank's shard of the sum of all
    ranks' gradients.
    """

    @staticmethod
    def forward(ctx, shard, whole, key):
        ctx.whole, ctx.key, ctx.length = whole, key, shard.numel()
        return whole._gathered(shard, key)

    @staticmethod
    def backward(ctx, slope):
        whole, param = ctx.whole, ctx.whole.params[ctx.key]
        whole.vote.before()
        length = -(-param.ds_numel // _ranks(param))
        flat = slope.new_zeros(length * _ranks(param))
        flat[: param.ds_numel] = slope.reshape(-1)
        return reduce.scattered_sum(flat, whole.group)[: ctx.length].clone(), None, None


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


@contextlib.contextmanager
def _without_hooks(modules):
    """Take DeepSpeed's hooks off the modules, and put every hook back in its place."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept = [(getattr(m, kind), dict(getattr(m, kind))) for m in modules for kind in kinds]
    try:
        for hooks, _ in kept:
            for number in [n for n, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed")]:
                del hooks[number]
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
