"""The plug-in's numbers in the writers that Megatron-DeepSpeed has open already: TensorBoard and wandb."""

import numpy as np

_BY_DOMAIN = ("weights", "s", "s_se", "score", "score_se", "train", "valid", "served")


def listener(plan):
    """record line -> scalars of the host's own writers; None on ranks without one (only the last rank has them).

    Series are commute/KIND/DOMAIN with KIND of _BY_DOMAIN or budget_left, and commute/probe_milliseconds.
    """
    from megatron import get_tensorboard_writer, get_wandb_writer
    from megatron.training import interop_tool_logger

    writer = interop_tool_logger(tb_writer=get_tensorboard_writer(), wandb_writer=get_wandb_writer())
    if not writer.is_enabled():
        return None

    def listen(line):
        if "step" not in line:
            return
        for kind in _BY_DOMAIN:
            for name, value in _pairs(plan.names, line.get(kind)):
                writer.add_scalar(f"commute/{kind}/{name}", value, line["step"])
        if line["event"] == "loss":
            for name, budget in zip(plan.names, plan.budgets, strict=True):
                if budget is not None:
                    left = budget - line["served"][name]
                    writer.add_scalar(f"commute/budget_left/{name}", left, line["step"])
        if line["event"] in ("probe", "skip"):
            spent = 1000 * line["timing"]["probe_seconds"]
            writer.add_scalar("commute/probe_milliseconds", spent, line["step"])

    return listen


def heard(write, listen):
    """`write` of hook.Hook with `listen` told of every line; a writer that fails is told of nothing more, and training goes
    on."""
    listeners = [] if listen is None else [listen]

    def written(event, **fields):
        write(event, **fields)
        for one in list(listeners):
            try:
                one({"event": event, **fields})
            except Exception as fault:
                listeners.clear()
                print(
                    f"commute: no more scalars, the writer failed: {type(fault).__name__}: {fault}",
                    flush=True,
                )

    return written


def _pairs(names, values):
    """(name, number) of a dict or of an array [K] in the order of `names`; several targets and missing numbers are left
    out."""
    if isinstance(values, dict):
        pairs = values.items()
    elif values is None or np.ndim(values) != 1:
        return []
    else:
        pairs = zip(names, np.asarray(values).tolist(), strict=True)
    return [(name, value) for name, value in pairs if isinstance(value, int | float)]
