"""What the lines of a record say: pure functions from what is known to the fields written."""

import dataclasses

import numpy as np

DIRECTION = "local"  # of every probe of a running job: the target's own gradient now
MEASURED = ("P", "P_se", "s", "s_se", "M", "u_g", "h_theta", "score", "score_se", "gap_se", "numerical")


def start(config, plan, run, parameters):
    """Fields of the start line. config, plan, run: of config.load, config.resolve and
    config.Run; parameters: a count.
    """
    return {
        "names": plan.names,
        "weights": plan.weights,
        "budgets": plan.budgets,
        "sizes": plan.sizes,
        "holdouts": plan.holdouts,
        "samples": plan.samples,
        "global_batch": run.global_batch,
        **({} if run.rampup is None else {"rampup_batch_size": run.rampup}),
        "seq_length": run.seq_length,
        "train_iters": run.train_iters,
        "mode": config.mode,
        "every": config.every,
        "lead": plan.lead,
        "seed": config.seed,
        "target": target(plan),
        "config": config.digest,
        "probe": dataclasses.asdict(config.probe) | {"direction": DIRECTION},
        "controller": dataclasses.asdict(config.controller),
        "warnings": plan.warnings,
        "parameters": parameters,
    }


def target(plan):
    """Shares of the target, or "each" where every domain is one."""
    return plan.targets[0] if len(plan.targets) == 1 else "each"


def probe(config, plan, found, weights, decision, effective):
    """Fields of a probe line: the measurement (a leading axis over targets for "each") and what
    was decided on it.

    found: probe.Measurement; weights f64[K] in force; decision: controller.Decision; effective:
    sample of new weights. What was not measured (P and M with probe.memory scores) is None.
    """
    one, moved = len(plan.targets) == 1, decision.weights is not None
    values = {name: getattr(found, name) for name in MEASURED}
    values = {
        name: None if np.isnan(value).all() else value[0] if one else value for name, value in values.items()
    }
    settings = config.probe
    return {
        **values,
        "weights": weights,
        "weights_next": decision.weights if moved else weights,
        "effective_sample": effective if moved else None,
        "reason": decision.reason,
        "target": target(plan),
        "metric": settings.metric,
        "direction": DIRECTION,
        "method": settings.method,
        "difference_step": found.step,
        "samples": settings.samples,
    }


def decision(weights, made, effective):
    """Fields of a decision that no probe has led to; arguments as of `probe`."""
    moved = made.weights is not None
    return {
        "weights": weights,
        "weights_next": made.weights if moved else weights,
        "effective_sample": effective if moved else None,
        "reason": made.reason,
    }


def left(plan, sample, served):
    """What a run that stops at `sample` leaves: its samples and those of every budget; None at its
    end. served: i64[K].
    """
    if sample >= plan.samples:
        return None
    owed = zip(plan.names, plan.budgets, np.asarray(served).tolist(), strict=True)
    return {
        "samples": plan.samples - sample,
        "budgets": {name: budget - count for name, budget, count in owed if budget is not None},
    }


def left_words(left, plan, sample):
    """One sentence about `left`."""
    told = f"THE RUN ENDED EARLY, at sample {sample} of {plan.samples}"
    if not left["budgets"]:
        return told
    given = dict(zip(plan.names, plan.budgets, strict=True))
    parts = [f"{name} {count} of {given[name]}" for name, count in left["budgets"].items()]
    return f"{told}; left of the budgets: {', '.join(parts)}"


def laws(decisions):
    """What each law decided: {law: controller.Decision} -> JSON values."""
    return {law: {"weights": d.weights, "reason": d.reason} for law, d in decisions.items()}


def sentence(step, names, found, weights, decision, effective):
    """One line for the screen about a probe and its decision."""
    rows = zip(names, found.score[0], found.score_se[0], strict=True)
    scores = ", ".join(f"{name} {score:+.3g}±{error:.2g}" for name, score, error in rows)
    told = f"probe at step {step}: scores {scores} | {decision.reason}"
    if decision.weights is None:
        return told
    moves = ", ".join(
        f"{n} {a:.3f}→{b:.3f}" for n, a, b in zip(names, weights, decision.weights, strict=True)
    )
    return f"{told} | {moves} from sample {effective}"
