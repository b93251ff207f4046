"""Law `flow` in a run: planned before its first sample, kept in its state, checked when it goes
on. Mode fixed follows the plan, mode act makes it again from what is left (flow_act.py).
"""

import dataclasses

import numpy as np

from megatron_commute.config import ConfigError
from megatron_commute.decide import flow
from megatron_commute.decide.laws import LAWS
from megatron_commute.settings.values import LARGEST_MEMORY

CURVE_POINTS = 200  # at most, of the curves of rate and profile in a record


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowRun:
    """A run, or the rest of one, planned by law flow. T steps, K domains."""

    schedule: flow.FlowSchedule
    # its changes of weights
    rates: np.ndarray
    # learning rate f64[T] of every step
    memory: float
    # of the profile
    kept: int
    # first steps of the run at the planned mixture
    begin: int
    # first step that was planned here; above 0 after an accepted change
    used: tuple[int, ...] | None
    # samples of each domain before it
    retired: int
    # and of domains that had left by then
    target: tuple[float, ...]
    # share of each domain
    strength: float


def follows(config) -> bool:
    """Whether law flow plans the weights of this mixture file."""
    return LAWS[config.controller.law].planned


def memory_of(config) -> float:
    """Memory of a mixture file's controller, as far as any was measured."""
    return min(config.controller.memory, LARGEST_MEMORY)


def compared(config, plan, run, learning_rate) -> FlowRun | None:
    """The FlowRun of a run whose weights another law, or the host, decides, where it asks for flow
    beside (controller.compare): planned from the run's first step, kept in no state; else None.

    ConfigError as of `rates_of` and `planned`.
    """
    if follows(config) or not any(LAWS[name].planned for name in config.controller.compare):
        return None
    rates = rates_of(config, learning_rate, run.train_iters)
    return planned(config=config, plan=plan, run=run, rates=rates)


def rates_of(config, learning_rate, steps: int) -> np.ndarray:
    """Learning rates f64[steps] of a host's `learning_rate` (step -> rate). ConfigError where it
    does not tell them all.
    """
    found = np.full(steps, np.nan)
    why = ""
    for step in range(steps):
        try:
            found[step] = learning_rate(step)
        except Exception as fault:
            why = f": {type(fault).__name__}: {fault}"
            break
        if not np.isfinite(found[step]):
            break
    if not np.isfinite(found).all():
        problem = (
            f"flow needs the learning rate of every step, the host does not tell that of step {step}{why}"
        )
        raise _refusal(config, problem, f"give it --lr and --lr-decay-style, or {_without(config)}")
    if steps > 1 and (np.diff(found) > 0).all():
        problem = (
            f"the learning rate still rises at the last of {steps} steps: the run is shorter than its warm-up"
        )
        raise _refusal(config, problem, f"shorten the warm-up (--lr-warmup-iters), or {_without(config)}")
    return found


def planned(*, config, plan, run, rates, mixture=None, state=None, anew=False) -> FlowRun:
    """The FlowRun of a mixture file, a config.Plan, a config.Run and the learning rates f64[T] of
    its steps.

    mixture: where the run stands, None at its start. state: of a checkpoint (Hook.state_dict), to
    make the same weights again wherever it stands; anew: from where it stands, in mode act still on
    the scale of the state. Raises ConfigError with its cure.
    """
    begin, used, retired, again, memory = 0, None, 0, {}, memory_of(config)
    state = None if state is None else state.get("flow")
    if state is not None and (config.mode == "act" or not anew):
        kept = min(state["kept"], len(rates) - 1)  # of a run that was longer
        again = {"scale": flow.Scale(**state["scale"]), "kept": kept}
        if state["memory"] != memory:  # by consent: other steps count most
            again["scale"] = flow.scale_of(rates, memory, kept)
    if state is not None and not anew:
        begin, used, retired = state["begin"], state["used"], state["retired"]
    elif mixture is not None:
        begin, used, retired = run.batches.step(mixture.index), mixture.served, mixture.retired
    kept = again.get("kept", flow.kept_steps(len(rates)))
    low, high = bounds(config, plan) if follows(config) else (plan.minimum, plan.maximum)
    try:
        schedule = flow.planned(
            rates=rates,
            batches=run.batches.of_steps(len(rates)),
            budgets=plan.budgets,
            weights=plan.weights,
            target=plan.targets[0],
            low=low,
            high=high,
            strength=config.controller.strength,
            memory=memory,
            kept=kept,
            scale=again.get("scale"),
            begin=begin,
            used=used,
            retired=retired,
        )
    except ValueError as error:
        raise _refusal(config, *str(error).rsplit(": ", 1)) from error
    return FlowRun(
        schedule=schedule,
        rates=rates,
        memory=memory,
        kept=kept,
        begin=begin,
        used=None if used is None else tuple(int(n) for n in used),
        retired=int(retired),
        target=tuple(float(share) for share in plan.targets[0]),
        strength=config.controller.strength,
    )


def continued(state: dict, plan) -> np.ndarray:
    """Weights f64[K] that go on from those of a checkpoint's state in a run whose domains may be
    others: a new one takes its planned weight off the rest.
    """
    before = dict(zip(state["ledger"]["names"], state["mixture"]["weights"], strict=True))
    old = np.array([before.get(name, 0.0) for name in plan.names])
    new = np.where([name in before for name in plan.names], 0.0, plan.weights)
    return plan.weights if not old.any() else old / old.sum() * (1.0 - new.sum()) + new


def with_weights(found: FlowRun, weights, batches) -> FlowRun:
    """The same plan with these weights f64[M, K], those of the first rank."""
    changes = flow.changes_of(batches.begin(found.schedule.edges[:-1]), weights)
    return dataclasses.replace(
        found, schedule=dataclasses.replace(found.schedule, weights=weights, changes=changes)
    )


def bounds(config, plan):
    """Least and greatest weights f64[K] that flow may plan: min and max, and the controller's
    floors and caps.
    """
    K, law = len(plan.names), config.controller
    low = np.maximum(plan.minimum, law.floors or [0.0] * K)
    high = np.minimum(plan.maximum, law.caps or [1.0] * K)
    for key, outside, bound in (
        ("floors", plan.shares < low - 1e-9, low),
        ("caps", plan.shares > high + 1e-9, high),
    ):
        for k in np.flatnonzero(outside):
            name, share = plan.names[k], plan.shares[k]
            problem = f"{bound[k]:g} leaves out the planned share of {name}, {share:.6g}"
            raise config.error(
                f"controller.{key}", problem, "write bounds on either side of every planned share"
            )
    return low, high


def state_of(found: FlowRun) -> dict:
    """What a checkpoint keeps of a plan, as JSON values."""
    kept = ("memory", "kept", "begin", "used", "retired", "target", "strength")
    return {"scale": dataclasses.asdict(found.schedule.scale)} | {name: getattr(found, name) for name in kept}


def differences(state: dict | None, config, plan, rates) -> list[str]:
    """What the plan of a checkpoint's state (None: its law was another) and today's file and rates
    f64[T] do not share, one sentence each.
    """
    if not follows(config):
        return [] if state is None else [f"the law was flow, it is {config.controller.law}"]
    if state is None:
        return ["the law was not flow"]
    found = []
    try:
        if config.mode != "act":  # whose decisions ask for the rates to come, not for those planned
            flow.check_scale(flow.Scale(**state["scale"]), rates, state["memory"], state["kept"])
    except ValueError as error:
        found.append(str(error).partition(": ")[0])
    pairs = (("target", tuple(state["target"]), tuple(plan.targets[0])),
             ("strength", (state["strength"],), (config.controller.strength,)),
             ("memory", (state["memory"],), (memory_of(config),)))  # fmt: skip
    for what, before, now in pairs:
        if len(before) != len(now) or not np.allclose(before, now, rtol=0, atol=1e-12):
            found.append(f"the {what} of flow was {_said(before)}, it is {_said(now)}")
    return found


def _said(numbers):
    return " ".join(f"{number:.6g}" for number in numbers)


def sentence(found: FlowRun, names) -> str:
    """One line for the screen: how the weights will move."""
    told = [
        f"{name} {w.min():.3g} to {w.max():.3g}"
        for name, w in zip(names, found.schedule.weights.T, strict=True)
    ]
    first = max(found.kept - found.begin, 0)
    return (
        f"law flow: weights {', '.join(told)}; the next {first} steps as planned"
        if first
        else (f"law flow: weights {', '.join(told)}")
    )


def told(found: FlowRun, batches) -> dict:
    """What the start line says of it: the constants, the weights segment by segment, the curves of
    rate and profile.
    """
    schedule, steps = found.schedule, len(found.rates)
    at = np.unique(np.linspace(0, steps - 1, min(steps, CURVE_POINTS)).round().astype(int))
    return {
        **state_of(found),
        "kept_samples": batches.begin(found.kept),
        "ranges": schedule.ranges,
        "notes": schedule.notes,
        "segments": {"sample": batches.begin(schedule.edges[:-1]), "weights": schedule.weights},
        "curves": {"sample": batches.begin(at), "rate": found.rates[at], "profile": schedule.profile[at]},
    }


def _without(config):
    return "write law: hold" if follows(config) else "take flow out of compare"


def _refusal(config, problem, cure="change the mixture file") -> ConfigError:
    return config.error(f"controller.{'law' if follows(config) else 'compare'}", problem, cure)
