"""What probes draw from the holdouts and what they cost, counted from the settings alone."""

from collections.abc import Mapping
from typing import NamedTuple

from megatron_commute.settings.shares import Run
from megatron_commute.settings.values import Config, Probe

# Gradients that one sequence costs in a probe: counted for `difference`, the most in
# tests/bench/hvp.csv for `exact`.
GRADIENTS_PER_SAMPLE = {"difference": 2.0, "exact": 3.1, "fused": 3.0}
CHECK_GRADIENTS = 4  # of one sequence a domain and target: the estimate of what a difference errs by


class HoldoutParts(NamedTuple):
    """Disjoint positions in a holdout: gradients get half, direction and the targets of a design a
    quarter each.
    """

    gradients: range
    direction: range
    targets: range


def holdout_parts(n: int) -> HoldoutParts:
    """Splits the positions 0..n-1 of a holdout; what does not divide goes to the last part."""
    half, quarter = n // 2, n // 4
    return HoldoutParts(range(half), range(half, half + quarter), range(half + quarter, n))


def sequences_drawn(probe: Probe) -> dict[str, int]:
    """{what for: sequences that one probe draws from a domain's holdout}, all splits together."""
    direction = probe.splits * direction_samples(probe.samples, probe.splits)
    return {"gradient": probe.samples, "direction": direction}


def direction_samples(samples: int, splits: int) -> int:
    """Sequences per domain for the direction of one split: half of what its gradients take, at
    least one.
    """
    return max(1, samples // splits // 2)


def probe_steps(every: int, train_iters: int) -> range:
    """Numbers of finished steps after which a probe runs: none before the first step or after the
    last.
    """
    return range(every, train_iters, every)


class ProbeCost(NamedTuple):
    """What the probes of a run cost beside its training."""

    probes: int
    # in the run
    gradients: float
    # of sequences, in one probe
    share: float
    # of what training takes, all probes together


def probe_cost(config: Config, run: Run) -> ProbeCost:
    """Counted, not timed: training costs one gradient per sequence, a probe those of method and
    direction.

    probe.memory auto counts as full or sharded: only the running job knows whether it must fall
    back to scores.
    """
    domains = len(config.domains)
    targets = domains if config.target == "each" else 1
    in_target = (
        sum(1 for share in config.target.values() if share) if isinstance(config.target, Mapping) else domains
    )
    sequences = sequences_drawn(config.probe)
    products = GRADIENTS_PER_SAMPLE[config.probe.method] * sequences["gradient"] * domains * targets
    products *= 2 if config.probe.memory == "scores" else 1  # it takes every product twice
    if config.probe.method == "difference":
        products += CHECK_GRADIENTS * domains * targets
    gradients = products + sequences["direction"] * in_target
    probes = len(probe_steps(config.every, run.train_iters))
    return ProbeCost(probes, gradients, probes * gradients / run.samples)
