"""How long Megatron-DeepSpeed trains: its loop ends by steps or by tokens, whichever comes first,
and a job may end before that. Its steps may grow by --rampup-batch-size.
"""

from megatron_commute.config import ConfigError
from megatron_commute.settings.batches import Batches


def rampup(args):
    """--rampup-batch-size as numbers, None without it. args: Megatron's own after validation."""
    return None if args.rampup_batch_size is None else tuple(map(int, args.rampup_batch_size))


def steps_of_run(args):
    """Steps that the host will take from the first to the last, whichever flag ends them.

    args: as of `rampup`. Raises ConfigError where the host could not begin.
    """
    batches = Batches(args.global_batch_size, rampup(args))
    tokens = args.train_tokens
    by_tokens = None if tokens is None else _first_after(batches, tokens, args.seq_length)
    if not args.train_iters and not args.train_samples:
        if by_tokens is None:
            raise ConfigError("--train-iters: missing; write it, or --train-samples")
        raise ConfigError(
            f"--train-tokens: Megatron-DeepSpeed wants steps or samples beside it; add --train-samples "
            f"{batches.begin(by_tokens)}"
        )
    steps = args.train_iters or _steps_of_samples(batches, args.train_samples)
    return steps if by_tokens is None else min(steps, by_tokens)


def _steps_of_samples(batches, samples):
    """Whole steps within so many samples, as training.update_train_iters counts them."""
    ramp = batches.first_full
    return ramp + (samples - batches.begin(ramp)) // batches.full


def _first_after(batches, tokens, seq_length):
    """The first step before which so many tokens are consumed."""
    return batches.step(batches.next(max(0, -(-tokens // seq_length))))


def refuse_other_steps(args, run, consumed):
    """Raise ConfigError where the host, from its checkpoint on, would not take the steps of `run`,
    a config.Run: its batches were others, or its tokens those of sequences of another length.

    args: once the host has loaded it; consumed: samples consumed by it.
    """
    batches, steps = run.batches, run.train_iters
    if batches.begin(args.iteration) != consumed:
        raise ConfigError(
            f"--global-batch-size: the checkpoint stands at sample {consumed} after {args.iteration} steps, "
            f"which take {batches.begin(args.iteration)} now; write it, and --rampup-batch-size, as it was "
            "trained with"
        )
    if args.train_tokens is None:
        return
    left = args.train_tokens - args.consumed_train_tokens
    end = batches.next(consumed + max(0, -(-left // args.seq_length)))
    end = min(args.train_iters, batches.step(end))
    if end == steps:
        return
    fitting = args.consumed_train_tokens + (run.samples - consumed) * args.seq_length
    raise ConfigError(
        f"--train-tokens: the checkpoint counts {args.consumed_train_tokens} tokens after {consumed} "
        f"samples, so the host would end at step {end}, not {steps}; write --train-tokens {fitting}"
    )


def going_on(args):
    """How to go on with a run whose job has ended before it."""
    if not args.save:
        return "no checkpoint was kept: write --save FOLDER, and start it again from the beginning"
    return f"start the same command with --load {args.save} to go on"
