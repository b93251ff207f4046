"""ZeRO-3 with partitioned parameters: a probe measures what one process does, and leaves training bit for bit alone."""

import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute import reduce
from megatron_commute.adapters import zero3
from megatron_commute.measure import probe


def probed(engine, how=None, **more):
    groups = reduce.Groups(reduce.everyone(), None, reduce.everyone())
    return stacks.measured(zero3.probe_model(engine, stacks.loss, 2), groups, how, **more)


def alone(module=None, second_moments=None, **how):
    """What one process measures, with the decay of these engines: on every parameter."""
    module = module or stacks.Stack()
    return stacks.alone(module, second_moments, decayed=[True for _ in module.parameters()], **how)


def trained(engine, rank, steps=4, between=lambda: None):
    """Losses of this rank over micro-batches, two a step, under dropout and clipping."""
    torch.manual_seed(rank)
    losses = []
    for number in range(2 * steps):
        tokens = stacks.draw("train", number % 3, np.arange(2) + 2 * number + 100 * rank)
        inputs, labels = stacks.batch(tokens)
        value = stacks.cross_entropy(engine(inputs), labels)
        engine.backward(value)
        if number == 2:
            between()  # in the middle of accumulation
        engine.step()
        losses.append(float(value.detach()))
        if number == 3:
            between()
    return losses


def state(engine):
    """What training would go on from: shards, optimiser, gradients of half a step, counters, prefetch, hooks, flags."""
    optimizer = engine.optimizer
    tensors = [p.ds_tensor for p in engine.module.parameters()]
    tensors += [t for s in optimizer.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    tensors += [t for group in optimizer.averaged_gradients.values() for t in group or ()]
    coordinator = optimizer.parameter_offload.get_param_coordinator()
    told = [engine.micro_steps, engine.global_steps, optimizer.micro_step_id, optimizer.overflow]
    told += [m.training for m in engine.module.modules()]
    told += [(p.ds_status, p.grad is None, tuple(p.shape)) for p in engine.module.parameters()]
    told += [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()]
    told += [type(m._parameters).__name__ for m in engine.module.modules()]
    told += [vars(coordinator)["_PartitionedParameterCoordinator__step_id"]]
    return [t.detach().clone() for t in (*tensors, torch.get_rng_state())], told


def everything(rank):
    """On 2 ranks: what is measured before and after training, training with and without probes, faults."""
    stacks.start()
    told, engine = {}, stacks.zero3_engine(2)
    told["sharded"] = (
        sum(p.ds_numel for p in engine.module.parameters()),
        sum(p.numel() for p in zero3.probe_model(engine, stacks.loss, 2).parameters()),
    )
    for mode in ("full", "scores"):
        told[mode] = probed(engine, stacks.settings(memory=mode))
    reduce.traffic.reset()
    zero3.probe_model(engine, stacks.loss, 2).gradient(
        zero3.probe_model(engine, stacks.loss, 2).parameters(), [(stacks.draw("gradient", 0, [0]), 1.0)]
    )
    told["traffic"] = dict(reduce.traffic.by_kind)
    told["none yet"] = refused(engine, stacks.settings(metric="adam"))
    told["exact"] = refused(engine, stacks.settings("exact"))
    told["alone"] = trained(stacks.zero3_engine(2), rank)
    seen = []
    told["watched"] = trained(engine, rank, between=lambda: seen.append(probed(engine).P))
    told["probes"] = len(seen)
    told["adam"] = probed(engine, stacks.settings(metric="adam"))
    told["weights"], told["moments"] = whole(engine)
    told["faults"] = stacks.survived(
        rank, engine, lambda kind, draw, limit: probed(engine, draw=draw, limit=limit), state
    )
    return told


def refused(engine, how):
    try:
        return probed(engine, how)
    except probe.ProbeFailed as fault:
        return str(fault)


def whole(engine):
    """Weights and second moments of the whole model, as DeepSpeed itself gathers them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    names, params = zip(*engine.module.named_parameters(), strict=True)
    corrected = 1 - 0.999**engine.global_steps
    return (
        {n: safe_get_full_fp32_param(p).clone() for n, p in zip(names, params, strict=True)},
        [safe_get_full_optimizer_state(p, "exp_avg_sq") / corrected for p in params],
    )


def half(rank):
    """On 2 ranks: bf16 weights, in shards."""
    stacks.start()
    engine = stacks.zero3_engine(2, bf16=True)
    trained(engine, rank, 1)
    weights = {n: p.float() for n, p in _gathered(engine).items()}
    before = state(engine)
    return probed(engine), weights, stacks.same(before, state(engine))


def _gathered(engine):
    import deepspeed

    found = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            found[name] = p.detach().clone()
    return found


# --- what is asserted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    return ranks.run(everything, 2, timeout=300)


def test_shards_measure_what_one_process_does(run):
    """float32 differences: 1e-4 of max|M|; parameters lie in shards for real, uneven ones."""
    expected = alone()
    assert {told["sharded"][0] for told in run} == {sum(p.numel() for p in stacks.Stack().parameters())}
    assert sum(told["sharded"][1] for told in run) == run[0]["sharded"][0]
    for told in run:
        stacks.assert_close(told["full"], expected)
        stacks.assert_close(told["scores"], expected, names=("s", "s_se"))


def test_the_metric_of_adam_is_read_from_shards(run):
    module = stacks.Stack()
    module.load_state_dict(run[0]["weights"])
    expected = alone(module, lambda: run[0]["moments"], metric="adam")
    for told in run:
        stacks.assert_close(told["adam"], expected)
        assert "probe.metric adam needs an Adam optimiser that has taken a step" in told["none yet"]
        assert "method exact needs a model that one rank runs as a whole" in told["exact"]


def test_training_with_probes_is_training_without(run):
    for told in run:
        assert told["watched"] == told["alone"] and len(set(told["alone"])) == 8 and told["probes"] == 2


def test_what_a_gradient_costs_the_network(run):
    """Each use of a parameter: gathered in forward, again where backward needs its values, and one scattered sum."""
    # as in test_shards.py, and a bias that DeepSpeed's linear layer keeps
    stacks.assert_traffic(run[0]["traffic"], again=5)


def test_a_fault_on_one_rank_is_told_by_all_and_leaves_no_trace(run):
    stacks.assert_survived(told["faults"] for told in run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_that_differ_in_a_bit_are_told_apart_and_nan_is_itself(dtype):
    one = torch.tensor([1.0, float("nan"), 0.0], dtype=dtype)
    for other, same in ((one.clone(), True), (one * torch.tensor([1, 1, -1]), False), (one + 1, False)):
        assert stacks.same(([one], 0), ([other.to(dtype)], 0)) == same
    assert not stacks.same(([one], 0), ([one], 1))


def test_half_precision_is_measured_in_float32():
    for found, weights, kept in ranks.run(half, 2, timeout=200):
        module = stacks.Stack()
        module.load_state_dict(weights)
        stacks.assert_close(found, alone(module))
        assert kept
