"""Plain data-parallel models with vectors in shards: a probe measures what one process does, and leaves the model alone."""

import numpy as np
import pytest
import ranks
import stacks
import torch

from megatron_commute import reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.measure import probe


def data_parallel():
    world = reduce.everyone()
    return reduce.Groups(world, None, world)


def second_moments(module):
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(p.shape, generator=generator) * 1e-3 for p in module.parameters() if p.requires_grad]


def made(kind):
    module = stacks.Stack().to(torch.bfloat16 if kind == "half" else torch.float64)
    if kind == "frozen":
        module.words.positions.requires_grad_(False)
    return module


def probed(module, mode="sharded", metric="adam", offload=False, **more):
    model = torch_loop.probe_model(module, stacks.loss, 2, lambda: second_moments(module))
    how = stacks.settings(memory=mode, metric=metric, offload=offload)
    return stacks.measured(model, data_parallel(), how, **more)


def state(module):
    """All that training would go on from."""
    tensors = [*module.parameters(), *(p.grad for p in module.parameters()), torch.get_rng_state()]
    told = [(m.training, type(m._parameters).__name__, len(m._forward_hooks)) for m in module.modules()]
    return [t.detach().clone() for t in tensors], told


def everything(rank):
    stacks.start()  # dropout and threads as the others have them
    told = {kind: probed(made(kind)) for kind in ("plain", "frozen")}
    told["half"] = probed(made("half"), metric="identity")
    for mode in ("full", "scores"):
        told[mode] = probed(made("plain"), mode)
    for mode in ("full", "sharded", "scores"):
        told[mode, "offloaded"] = probed(made("plain"), mode, offload=True)
    module = stacks.Stack()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = state(module)
    probed(module)
    told["kept"] = stacks.same(before, state(module))
    told["faults"] = stacks.survived(
        rank, module, lambda kind, draw, limit: probed(module, draw=draw, limit=limit), state
    )
    model = torch_loop.probe_model(module, stacks.loss, 2).shards(data_parallel())
    shards = list(model.parameters())
    told["own"] = sum(p.numel() for p in shards)
    reduce.traffic.reset()
    model.gradient(shards, [(stacks.draw("gradient", 0, [0]), 1.0)])
    told["traffic"] = dict(reduce.traffic.by_kind)
    try:
        recurrent = torch_loop.probe_model(torch.nn.LSTM(2, 2), lambda m, x: m(x)[0].mean(), 1)
        stacks.measured(recurrent, data_parallel(), stacks.settings(memory="sharded"))
    except probe.ProbeFailed as fault:
        told["recurrent"] = str(fault)
    return told


@pytest.fixture(scope="module")
def run():
    return ranks.run(everything, 2, timeout=300)


@pytest.mark.parametrize("kind", ["plain", "frozen"])
def test_shards_measure_what_one_process_does(run, kind):
    """To what rounding in float64 becomes when it is divided by eps; errors as well."""
    module = made(kind)
    expected = stacks.alone(module, lambda: second_moments(module), metric="adam")
    size = np.abs(expected.M).max()
    for told in run:
        names = ("M", "P", "s", "P_se", "s_se", "replicates")
        modes = {kind: names}
        if kind == "plain":
            modes |= {"full": names, ("full", "offloaded"): names, ("sharded", "offloaded"): names}
            modes |= {"scores": ("s", "s_se"), ("scores", "offloaded"): ("s", "s_se")}
        for mode, fields in modes.items():
            for name in fields:
                gap = np.abs(getattr(told[mode], name) - getattr(expected, name)).max()
                assert gap <= 1e-9 * size, (mode, name, gap / size)
            assert told[mode].step == pytest.approx(expected.step, rel=1e-9)


def test_half_precision_is_measured_in_float32(run):
    """float32 differences: 1e-4 of max|M|."""
    expected = stacks.alone(made("half").float())
    for told in run:
        stacks.assert_close(told["half"], expected)


def test_every_number_lies_on_one_rank(run):
    assert sum(told["own"] for told in run) == sum(p.numel() for p in stacks.Stack().parameters())
    assert abs(run[0]["own"] - run[1]["own"]) <= len(list(stacks.Stack().parameters()))


def test_what_a_gradient_costs_the_network(run):
    """Each use of a parameter: gathered in forward, again where backward needs its values, and one scattered sum."""
    stacks.assert_traffic(
        run[0]["traffic"], again=4
    )  # the matrices of linear layers and the weights of norms


def test_the_module_and_its_random_state_stay_as_they_were(run):
    assert all(told["kept"] for told in run)


def test_a_fault_on_one_rank_is_told_by_all_and_leaves_no_trace(run):
    stacks.assert_survived(told["faults"] for told in run)


def test_what_reads_its_weights_past_the_module_is_refused(run):
    assert all("write `memory: full`" in told["recurrent"] for told in run)
    np.testing.assert_array_equal(run[0]["plain"].P, run[1]["plain"].P)
