"""The plug-in's numbers in the writers that Megatron-DeepSpeed has open already: TensorBoard and
wandb.
"""

from megatron_commute.report import curves


def listener(plan):
    """record line -> scalars of the host's own writers; None on ranks without one (only the last
    rank has them).

    Series are commute/NAME with the names of `curves`.
    """
    from megatron import get_tensorboard_writer, get_wandb_writer
    from megatron.training import interop_tool_logger

    writer = interop_tool_logger(tb_writer=get_tensorboard_writer(), wandb_writer=get_wandb_writer())
    if not writer.is_enabled():
        return None

    def listen(line):
        for name, value in curves.of(line, plan.names, plan.budgets):
            writer.add_scalar(f"commute/{name}", value, line["step"])

    return curves.safe(listen, lambda words: print(words, flush=True))
