"""From a mixture file, a run and the data to the `Plan` that sampler, probe and controller
follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_commute.settings.mixture_file import Budget, Config, Controller, Domain, Probe, load
from megatron_commute.settings.probe_cost import (
    HoldoutParts,
    ProbeCost,
    direction_samples,
    holdout_parts,
    probe_cost,
    probe_steps,
    sequences_drawn,
)
from megatron_commute.settings.schedule import planned_counts
from megatron_commute.settings.shares import (
    Run,
    check_changes,
    exact_budgets,
    initial_weights,
    planned_changes,
    planned_shares,
    share_bounds,
)
from megatron_commute.settings.values import LARGEST_MEMORY
from megatron_commute.settings.yaml_checks import ConfigError

__all__ = [
    "Budget",
    "Config",
    "ConfigError",
    "Controller",
    "Domain",
    "HoldoutParts",
    "Plan",
    "Probe",
    "ProbeCost",
    "Run",
    "direction_samples",
    "holdout_parts",
    "load",
    "probe_cost",
    "probe_steps",
    "resolve",
    "wished_holdout",
]

LARGEST_HOLDOUT = 0.2
SCARCE = 0.2  # of the samples: law flow was measured to gain at a tenth, and to cost more at three tenths


@dataclass(frozen=True, eq=False)
class Plan:
    """What the run will do. K domains, T targets (1, or K for `each`).

    `weights` f64[K] until the first change; `budgets` sequences or None; `sizes` training
    sequences of each domain (holdout taken off, except in mode shadow, where the host's own data
    is untouched); `holdouts` held-out sequences; `targets` f64[T, K]; `minimum`, `maximum`
    f64[K] shares (in mode act with the floors and caps of the controller); `samples` of the
    whole run; `lead` samples; `shares` f64[K] of the run's samples that each domain gets when
    nothing moves; `schedule`: (at_sample, weights f64[K]) of mode fixed.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    budgets: tuple[int | None, ...]
    sizes: tuple[int, ...]
    holdouts: tuple[int, ...]
    targets: np.ndarray
    minimum: np.ndarray
    maximum: np.ndarray
    samples: int
    lead: int
    warnings: tuple[str, ...]
    shares: np.ndarray
    schedule: tuple[tuple[int, np.ndarray], ...] = ()


def resolve(
    config: Config, run: Run, sequences: Sequence[int], holdouts: Sequence[int | None] | None = None
) -> Plan:
    """Joins file, run and data. Raises ConfigError where they do not fit, naming the key and the
    cure.

    sequences: whole sequences in each domain's own files; holdouts: sequences in each domain's
    separate holdout file, None where the holdout comes off the end of the domain.
    """
    _check_run(run)
    budgets = exact_budgets(config, run)
    changes = planned_changes(config, run)
    weights = initial_weights(config, run, budgets, changes)
    average = planned_counts(weights, changes, run.samples) / run.samples
    shares = planned_shares(run, budgets, average)
    minimum, maximum = share_bounds(config, weights, shares)
    check_changes(config, run, weights, changes, budgets, minimum, maximum)
    held = _holdouts(config, sequences, holdouts or [None] * len(sequences))
    taken = [
        0 if config.mode == "shadow" or isinstance(d.holdout, str) else n
        for d, n in zip(config.domains, held, strict=True)
    ]
    sizes = tuple(n - off for n, off in zip(sequences, taken, strict=True))
    return Plan(
        names=config.names,
        weights=weights,
        budgets=tuple(budgets),
        sizes=sizes,
        holdouts=held,
        targets=_targets(config, shares),
        minimum=minimum,
        maximum=maximum,
        samples=run.samples,
        lead=_lead(config, run),
        warnings=tuple(_warnings(config, run, average, shares, sizes)),
        shares=shares,
        schedule=changes,
    )


def _check_run(run: Run) -> None:
    flags = {
        "--seq-length": run.seq_length,
        "--global-batch-size": run.global_batch,
        "--micro-batch-size": run.micro_batch,
        "--world-size": run.data_parallel,
        "--train-iters": run.train_iters,
    }
    for flag, value in flags.items():
        if value < 1:
            raise ConfigError(f"{flag}: got {value}; write a positive number")
    chunk = run.micro_batch * run.data_parallel
    if run.rampup is not None:
        _check_rampup(run, chunk)
    if run.global_batch % chunk:
        fitting = -(-run.global_batch // chunk) * chunk
        raise ConfigError(
            f"--global-batch-size: {run.global_batch} is not divisible by --micro-batch-size "
            f"{run.micro_batch} x data-parallel size {run.data_parallel} = {chunk}; "
            f"write {fitting}, or start another number of ranks"
        )


def _check_rampup(run: Run, chunk: int) -> None:
    first, increment, samples = run.rampup
    told = f"--rampup-batch-size {first} {increment} {samples}"
    if min(run.rampup) < 1 or first >= run.global_batch or (run.global_batch - first) % increment:
        raise ConfigError(
            f"{told}: write samples of the first step, below --global-batch-size {run.global_batch}, an "
            "increment that leads from it to that, and the samples of the ramp-up"
        )
    for size in run.batches.sizes:
        if size % chunk:
            raise ConfigError(
                f"{told}: a step of {size} samples is not divisible by --micro-batch-size "
                f"{run.micro_batch} x data-parallel size {run.data_parallel} = {chunk}; write multiples of "
                f"{chunk}"
            )


def wished_holdout(config: Config, domain: Domain) -> int:
    """Sequences held out at the end of a domain's own files."""
    return domain.holdout or max(4 * config.probe.samples, 256)


def _holdouts(config: Config, sequences: Sequence[int], apart: Sequence[int | None]) -> tuple[int, ...]:
    held = []
    for domain, total, separate in zip(config.domains, sequences, apart, strict=True):
        key = f"domains.{domain.name}.holdout"
        if total < 1:
            problem = f"{', '.join(domain.path)} holds no whole sequence"
            raise config.error(f"domains.{domain.name}.path", problem, "add text or shorten --seq-length")
        if isinstance(domain.holdout, str):
            if separate is None:
                raise ValueError(f"{key}: names a file, its number of sequences is needed")
            count = separate
        else:
            count = wished_holdout(config, domain)
            largest = int(total * LARGEST_HOLDOUT)
            if count > largest:
                origin = "" if domain.holdout else "the default, "
                problem = (
                    f"{origin}{count} sequences, is {count / total:.0%} of the {total} there are, over 20 %"
                )
                raise config.error(
                    key, problem, f"write {largest} or less, name a separate prefix, or add text"
                )
        parts = holdout_parts(count)
        need = sequences_drawn(config.probe)
        if len(parts.gradients) < need["gradient"] or len(parts.direction) < need["direction"]:
            enough = max(2 * need["gradient"], 4 * need["direction"])
            problem = f"{count} sequences are too few for one probe of {config.probe.samples} samples"
            raise config.error(key, problem, f"hold out {enough} or more, or lower probe.samples")
        held.append(count)
    return tuple(held)


def _targets(config: Config, shares: np.ndarray) -> np.ndarray:
    if config.target == "each":
        return np.eye(len(config.domains))
    if config.target is None:
        return shares[None, :].copy()
    target = np.array([[config.target.get(name, 0.0) for name in config.names]])
    return target / target.sum()


def _lead(config: Config, run: Run) -> int:
    """Samples between a decision and its effect; by default 4 global batches, or as many as data
    loaders read ahead.
    """
    needed = _read_ahead(run)
    if config.lead is None:
        return max(4, -(-needed // run.global_batch)) * run.global_batch
    if config.lead < needed:
        problem = f"{config.lead} samples, is less than the {needed} samples that the data loaders read ahead"
        raise config.error("lead", problem, f"write {needed} or more, or start fewer --num-workers")
    return config.lead


def _read_ahead(run: Run) -> int:
    return (run.prefetched + 1) * run.micro_batch * run.data_parallel


def _warnings(
    config: Config, run: Run, weights: np.ndarray, shares: np.ndarray, sizes: Sequence[int]
) -> list[str]:
    found = []
    for domain, weight, share, size in zip(config.domains, weights, shares, sizes, strict=True):
        key = f"domains.{domain.name}"
        if domain.budget and (left := domain.budget.remainder(run.seq_length)):
            whole = domain.budget.sequences(run.seq_length)
            found.append(
                f"{key}.budget: {whole} sequences of {run.seq_length} tokens, {left} tokens remain unused"
            )
        if abs(weight - share) > 0.01:
            found.append(f"{key}.weight: {weight:.3g}, but its share of the run's samples is {share:.3g}")
        if share * run.samples > size:
            found.append(f"{key}: its {size} sequences are used {share * run.samples / size:.2f} times")
        if config.mode == "shadow" and not isinstance(domain.holdout, str):
            found.append(f"{key}.holdout: in mode shadow the host trains on it too; name a prefix of its own")
    found += _of_flow(config, shares)
    cost = probe_cost(config, run)
    if cost.probes == 0:
        found.append(
            f"every: no probe within {run.train_iters} iterations when one comes every {config.every}"
        )
    if cost.share > config.measure_budget:
        found.append(
            f"measure_budget: probes cost {cost.share:.2%} of training, over {config.measure_budget:.2%}"
        )
    if config.lead is None and _read_ahead(run) > 4 * run.global_batch:
        found.append(
            f"lead: {_lead(config, run)} samples, over the usual 4 global batches, as data loaders read "
            f"{_read_ahead(run)} samples ahead"
        )
    if len(config.domains) == 1:
        found.append("domains: there is only one, so there is no order to choose")
    return found


def _of_flow(config: Config, shares: np.ndarray) -> list[str]:
    """Warnings about law flow."""
    found = []
    if config.controller.memory > LARGEST_MEMORY:
        told = f"{config.controller.memory:g}, over all that were measured; flow takes {LARGEST_MEMORY:g}"
        found.append(f"controller.memory: {told}")
    if config.controller.law == "flow" and isinstance(config.target, Mapping):
        least = min(s for name, s in zip(config.names, shares, strict=True) if config.target.get(name))
        if least > SCARCE:
            found.append(
                f"target: its scarcest domain has {least:.0%} of the samples; measured, flow gained at 10% "
                "and cost the others more at 30% and 60%"
            )
    return found
