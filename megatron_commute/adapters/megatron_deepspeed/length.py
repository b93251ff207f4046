"""How long Megatron-DeepSpeed trains: its loop ends by steps or by tokens, whichever comes first,
and a job may end before that.
"""

from megatron_commute.config import ConfigError


def steps_of_run(args):
    """Steps that the host will take from the first to the last, whichever flag ends them.

    args: Megatron's own after validation. Raises ConfigError where the host could not begin.
    """
    by_tokens = None if args.train_tokens is None else _steps(args, args.train_tokens)
    if not args.train_iters and not args.train_samples:
        if by_tokens is None:
            raise ConfigError("--train-iters: missing; write it, or --train-samples")
        raise ConfigError(
            f"--train-tokens: Megatron-DeepSpeed wants steps or samples beside it; add --train-samples "
            f"{by_tokens * args.global_batch_size}"
        )
    steps = args.train_iters or args.train_samples // args.global_batch_size
    return steps if by_tokens is None else min(steps, by_tokens)


def refuse_other_end(args, steps, consumed):
    """Raise ConfigError where the host, from its checkpoint on, would not end after `steps` steps:
    tokens consumed may have been those of sequences of another length.

    args: once the host has loaded it; consumed: samples consumed by it.
    """
    if args.train_tokens is None:
        return
    left = _steps(args, args.train_tokens - args.consumed_train_tokens)
    end = min(args.train_iters, consumed // args.global_batch_size + left)
    if end == steps:
        return
    fitting = args.consumed_train_tokens + (steps * args.global_batch_size - consumed) * args.seq_length
    raise ConfigError(
        f"--train-tokens: the checkpoint counts {args.consumed_train_tokens} tokens after {consumed} "
        f"samples, so the host would end at step {end}, not {steps}; write --train-tokens {fitting}"
    )


def going_on(args):
    """How to go on with a run whose job has ended before it."""
    if not args.save:
        return "no checkpoint was kept: write --save FOLDER, and start it again from the beginning"
    return f"start the same command with --load {args.save} to go on"


def _steps(args, tokens):
    return max(0, -(-tokens // (args.global_batch_size * args.seq_length)))
