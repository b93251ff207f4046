"""The plug-in's numbers in the writers that Megatron-DeepSpeed has open already: TensorBoard and wandb."""

from megatron_commute.record import log as record
from megatron_commute.report import curves


def listener(plan):
    """record line -> scalars of the host's own writers; None on ranks without one (only the last rank has them).

    Series are commute/NAME with the names of `curves`.
    """
    from megatron import get_tensorboard_writer, get_wandb_writer
    from megatron.training import interop_tool_logger

    writer = interop_tool_logger(tb_writer=get_tensorboard_writer(), wandb_writer=get_wandb_writer())
    if not writer.is_enabled():
        return None

    def listen(line):
        for name, value in _pairs(plan, line):
            writer.add_scalar(f"commute/{name}", value, line["step"])

    return listen


def heard(write, listen):
    """`write` of hook.Hook with `listen`, where there is one, told of every line; its faults do not touch training."""
    if listen is None:
        return write
    tell = curves.safe(listen, lambda words: print(words, flush=True))

    def written(event, **fields):
        write(event, **fields)
        tell({"event": event, **fields})

    return written


def _pairs(plan, line):
    """(name, number) of a line that the record has not seen: its arrays become what the record would hold."""
    return curves.of(record._plain(line), plan.names, plan.budgets)
