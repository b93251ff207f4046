"""The run's size and its shares: budgets, initial weights, bounds and planned changes.

K domains; every function raises ConfigError naming the key and the cure.
"""

from dataclasses import dataclass

import numpy as np

from megatron_commute.feasible import owed_shares
from megatron_commute.settings import batches, schedule
from megatron_commute.settings.mixture_file import SHARE_TOLERANCE
from megatron_commute.settings.values import Config


@dataclass(frozen=True)
class Run:
    """The run's size."""

    seq_length: int
    # tokens of a sequence
    global_batch: int
    # sequences of a step
    micro_batch: int
    # sequences of a forward pass on a rank
    data_parallel: int
    # ranks that see other samples
    train_iters: int
    # steps
    prefetched: int = 0
    # micro-batches that a loader holds ahead (prefetch_factor * num_workers)
    rampup: tuple[int, int, int] | None = None
    # of batches.Batches

    @property
    def batches(self) -> batches.Batches:
        """Samples of every step."""
        return batches.of_run(self.global_batch, self.rampup)

    @property
    def samples(self) -> int:
        return self.batches.begin(self.train_iters)


def exact_budgets(config: Config, run: Run) -> list[int | None]:
    """Sequences of every budget, None where there is none; what the run cannot meet exactly is
    refused.
    """
    budgets = [domain.budget and domain.budget.sequences(run.seq_length) for domain in config.domains]
    given = [budget for budget in budgets if budget is not None]
    for domain, budget in zip(config.domains, budgets, strict=True):
        if budget == 0:
            problem = f"{domain.budget.amount} tokens fill no sequence of {run.seq_length}"
            raise config.error(f"domains.{domain.name}.budget", problem, "write more tokens")
    total, everything = sum(given), len(given) == len(budgets)
    if total > run.samples or (everything and total != run.samples):
        largest = max(range(len(budgets)), key=lambda k: budgets[k] or 0)
        key = f"domains.{config.names[largest]}.budget"
        of_steps = f"{run.train_iters} iterations x global batch {run.global_batch}"
        if run.rampup is not None:
            of_steps = f"{run.train_iters} iterations, --rampup-batch-size {' '.join(map(str, run.rampup))}"
        problem = f"the budgets sum to {total} sequences, the run has {run.samples} ({of_steps})"
        cures = []
        if run.batches.next(total) == total:
            longer = f"--train-iters {run.batches.step(total)}"  # Megatron ramps up by samples only
            cures.append(f"run {longer if run.rampup is None else f'--train-samples {total}'}")
        fitting = budgets[largest] + run.samples - total
        if fitting > 0:
            cures.append(f"write {fitting} here")
        if everything and total < run.samples:
            cures.append("write null for a domain that may fill the rest")
        raise config.error(key, problem, " or ".join(cures) or "write smaller budgets or train longer")
    return budgets


def initial_weights(config: Config, run: Run, budgets: list[int | None], changes=()) -> np.ndarray:
    """Given weights stay; the omitted ones share what is left by budget (so all omitted: budget
    shares).

    A schedule that begins at sample 0 gives them where the file gives none.
    """
    given = [domain.weight for domain in config.domains]
    if changes and changes[0][0] == 0 and given.count(None) == len(given):
        return changes[0][1]
    omitted = [k for k, weight in enumerate(given) if weight is None]
    total = sum(weight for weight in given if weight is not None)
    rest = 1 - total
    if abs(rest) > SHARE_TOLERANCE and (not omitted or rest < 0):
        listed = ", ".join(f"{n} {w:g}" for n, w in zip(config.names, given, strict=True) if w is not None)
        raise config.error(
            "domains", f"the weights sum to {total:.6g} ({listed})", "write weights that sum to 1"
        )
    if not omitted:
        return np.asarray(given) / total
    if rest <= SHARE_TOLERANCE:
        key = f"domains.{config.names[omitted[0]]}.weight"
        raise config.error(
            key, "missing, and the others sum to 1 already", "write 0 here or lower the others"
        )
    endless = [k for k, budget in enumerate(budgets) if budget is None]
    known = dict(enumerate(budgets))
    if len(endless) == 1:
        known[endless[0]] = run.samples - sum(budget for budget in budgets if budget is not None)
    if len(omitted) > 1:
        for k in omitted:
            if not known[k]:
                key = f"domains.{config.names[k]}.weight"
                problem = "missing, and there is no budget to take the share from"
                raise config.error(key, problem, "write a weight (all sum to 1) or a budget")
    parts = np.array([known[k] for k in omitted], dtype=float) if len(omitted) > 1 else np.ones(1)
    weights = np.array([0.0 if weight is None else weight for weight in given])
    weights[omitted] = rest * parts / parts.sum()
    return weights / weights.sum()


def planned_shares(run: Run, budgets: list[int | None], weights: np.ndarray) -> np.ndarray:
    """Share of the run's samples of each domain: its budget, and for endless domains the rest by
    weight.
    """
    owed = np.array([np.nan if budget is None else budget for budget in budgets], dtype=np.float64)
    return owed_shares(owed, run.samples, weights)


def share_bounds(config: Config, weights: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds f64[K]; a bound that weight or budget share breaks is refused."""
    lower = [(domain.minimum, f"domains.{domain.name}.min") for domain in config.domains]
    upper = [(domain.maximum, f"domains.{domain.name}.max") for domain in config.domains]
    if config.mode == "act":
        law = config.controller
        lower = [max(a, (b, "controller.floors")) for a, b in zip(lower, law.floors, strict=True)]
        upper = [min(a, (b, "controller.caps")) for a, b in zip(upper, law.caps, strict=True)]
    if sum(bound for bound, _ in lower) > 1 + SHARE_TOLERANCE:
        total = sum(bound for bound, _ in lower)
        raise config.error(
            max(lower)[1], f"the lower bounds sum to {total:g}", "write bounds that sum to at most 1"
        )
    if sum(bound for bound, _ in upper) < 1 - SHARE_TOLERANCE:
        total = sum(bound for bound, _ in upper)
        raise config.error(
            min(upper)[1], f"the upper bounds sum to {total:g}", "write bounds that sum to at least 1"
        )
    for k, name in enumerate(config.names):
        for what, share in (("the weight", weights[k]), ("the share of the run's samples", shares[k])):
            if share < lower[k][0] - SHARE_TOLERANCE:
                problem = f"{lower[k][0]:g} is above {what} of {name}, {share:.6g}"
                raise config.error(lower[k][1], problem, f"write at most {share:.6g}, or give {name} more")
            if share > upper[k][0] + SHARE_TOLERANCE:
                problem = f"{upper[k][0]:g} is below {what} of {name}, {share:.6g}"
                raise config.error(upper[k][1], problem, f"write at least {share:.6g}, or give {name} less")
    return np.array([bound for bound, _ in lower]), np.array([bound for bound, _ in upper])


def planned_changes(config: Config, run: Run) -> tuple[tuple[int, np.ndarray], ...]:
    """Changes (at_sample, weights f64[K]) of the schedule's file, none without one."""
    if config.schedule is None:
        return ()
    try:
        points = schedule.read(config.schedule, config.names, run.samples, run.seq_length)
    except ValueError as error:
        raise config.error("schedule", *str(error).rsplit("; ", 1)) from error
    return schedule.changes(points, run.batches)


def check_changes(config: Config, run: Run, weights, changes, budgets, minimum, maximum) -> None:
    """Refuses a schedule that passes a bound or misses a budget."""
    if not changes:
        return
    facts = (config.names, budgets, run.samples, minimum, maximum)
    try:
        schedule.refuse_impossible(weights, changes, *facts)
    except ValueError as error:
        raise config.error("schedule", *str(error).rsplit("; ", 1)) from error
