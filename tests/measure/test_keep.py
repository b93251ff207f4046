"""Bytes that a probe holds while its vectors lie in shards, beside the parameters or in the memory of the host."""

from unittest import mock

import hvp_methods
import numpy as np
import pytest
import ranks
import torch

from megatron_commute import config, reduce
from megatron_commute.adapters import torch_loop
from megatron_commute.cli import plan as plan_command
from megatron_commute.measure import keep, probe

WIDE, DEEP = 300, 4


def held_in_shards(rank, size, mode, domains, half, offload=False):
    """Bytes of tensors alive at the worst moment of a probe, beside the parameters, on a gloo rank of `size`."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(*[torch.nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEEP)])
    module = module.to(torch.bfloat16) if half else module
    world = reduce.everyone()
    groups = reduce.Groups(world, None, world)

    def moments():
        return (torch.ones_like(p, dtype=torch.float32) for p in module.parameters())

    model = torch_loop.probe_model(module, lambda m, x: m(x).square().mean(), 1, moments)
    how = config.Probe(samples=16, splits=2, memory=mode, offload=offload)
    team, even = reduce.team(groups, 2, together=True), np.full(domains, 1 / domains)

    def draw(part, domain, numbers):
        return torch.full((len(numbers), WIDE), 1.0 + domain)

    def measure():
        probe.measure(model, groups, team, draw, how, even[None], even, (0.1, (1.0, 1.0)))

    own = sum(p.numel() * p.element_size() for p in module.parameters())
    chosen = probe.choose_memory(model, groups, how, domains)
    with mock.patch.object(keep.Keep, "zeros", kept := Kept(keep.Keep.zeros)):
        held = hvp_methods.peak(measure) - own
    return held, chosen.bytes, chosen.host, kept.bytes


class Kept:
    """Keep.zeros, which counts the bytes that it gives."""

    def __init__(self, zeros):
        self.zeros, self.bytes = zeros, 0

    def __get__(self, keep, kind):
        def counted(params):
            found = self.zeros(keep, params)
            self.bytes += sum(v.numel() * v.element_size() for v in found)
            return found

        return counted


@pytest.mark.parametrize(
    ("size", "mode", "domains", "half"),
    [(2, "sharded", 2, False), (4, "sharded", 2, False), (4, "sharded", 6, True), (2, "scores", 2, False)],
)
def test_the_peak_in_shards_is_what_plan_states(size, mode, domains, half):
    """Within a tenth on every rank, and at most (2K + 6) / R vectors and three of the largest layer."""
    names = tuple(config.Domain(name=str(k), path=(str(k),)) for k in range(domains))
    run, layer = config.Run(8, 8, 1, size, 100), WIDE**2
    planned = plan_command.probe_memory(config.Config(domains=names), run, DEEP * layer, layer)[mode]
    stated = planned["bytes"] + (4 * DEEP * layer / size if half else 0)
    for held, chosen, host, _ in ranks.run(held_in_shards, size, size, mode, domains, half, timeout=200):
        assert chosen == stated and host == 0
        assert 0.9 * stated <= held <= 1.1 * stated, held / stated
        assert held <= 4 * layer * ((2 * domains + 6) / size * DEEP + 3)


def test_vectors_in_the_memory_of_the_host_are_those_stated():
    """On a CPU it is the same memory: what is stated for device and host sums to the peak, and the host's part is kept."""
    layer, domains = WIDE**2, 3
    for held, chosen, host, kept in ranks.run(
        held_in_shards, 2, 2, "sharded", domains, False, True, timeout=200
    ):
        assert chosen == 4 * layer * (2 / 2 * DEEP + 3)
        assert host == kept == 4 * layer * DEEP * (2 * domains + 2) / 2
        assert 0.9 * (chosen + host) <= held <= 1.1 * (chosen + host), held / (chosen + host)
