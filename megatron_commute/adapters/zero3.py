"""ZeRO-3: the shards of DeepSpeed's own parameters as `shards` wants them, without the engine.

DeepSpeed's hooks rest while a probe works: its parameters, prefetch trace, gradient partitions,
counters and overflow flags take no part.
"""

import contextlib

from megatron_commute import reduce
from megatron_commute.adapters import shards, torch_loop
from megatron_commute.adapters.metric import adam_metric
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
    cuts = {p: _cut(p) for p in everything}

    def rest():
        return _without_hooks(list(module.modules()))

    @contextlib.contextmanager
    def silent(method):
        with torch_loop.quiet(module), quiet() if quiet is not None else contextlib.nullcontext():
            yield

    def metric(name):
        if name == "identity":
            return None
        return adam_metric(lambda: second_moments(engine, params), counted, here.world)

    return Model(
        parameters=lambda: full_precision(_shard(p) for p in params),
        loss=None,
        owned=counted,
        decayed=decayed(engine, params),
        metric=metric,
        quiet=silent,
        micro_batch=micro_batch,
        low_precision=low_precision(everything),
        gradient=shards.gradient(module, loss, cuts, here, rest),
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


def _cut(param):
    shape, ranks = tuple(param.ds_shape), _ranks(param)
    rank = reduce.rank_in(param.ds_process_group)
    return shards.Cut(shape=shape, ranks=ranks, rank=rank, part=lambda: _shard(param), device=param.device)


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
