"""Megatron-DeepSpeed with one line changed: `pretrain` below in place of
megatron.training.pretrain.

Without --commute the host's own pretrain runs and nothing else happens. With it, functions that
megatron.training looks up in its own module are wrapped for the time of the run; nothing of the
host is edited, and a probe never writes to its model.
"""

import contextlib

from megatron_commute.adapters import restart
from megatron_commute.adapters.megatron_deepspeed.run import TrainingRun, replaced


def pretrain(
    train_valid_test_dataset_provider,
    model_provider,
    model_type,
    forward_step_func,
    process_non_loss_data_func=None,
    extra_args_provider=None,
    args_defaults={},  # noqa: B006  the host's own default
    data_post_process=None,
    external_args={},  # noqa: B006
):
    """megatron.training.pretrain with the flags of `add_arguments`: same arguments, same result.

    A mixture file, data or flags that do not fit end the run with one line and exit status 2 before
    the model is built. A run with --commute that loses a rank or node ends with a RuntimeError that
    says so and where the restart resumes.
    """
    from megatron import training

    def provider(parser):
        return add_arguments(parser if extra_args_provider is None else extra_args_provider(parser))

    initialize, run = training.initialize_megatron, None

    with contextlib.ExitStack() as wrapped:

        def initialised(*args, **named):
            nonlocal run
            result = initialize(*args, **named)
            from megatron import get_args

            args = get_args()
            if args.commute is not None:
                wrapped.enter_context(restart.explained(args.rank, args.world_size, args.load))
                run = wrapped.enter_context(TrainingRun(args, forward_step_func).installed(training))
            return result

        wrapped.enter_context(replaced(training, initialize_megatron=initialised))
        try:
            result = training.pretrain(
                train_valid_test_dataset_provider,
                model_provider,
                model_type,
                forward_step_func,
                process_non_loss_data_func=process_non_loss_data_func,
                extra_args_provider=provider,
                args_defaults=args_defaults,
                data_post_process=data_post_process,
                external_args=external_args,
            )
        except SystemExit as end:  # the host's way to end by --exit-interval and its kin
            if run is not None and not end.code:
                run.finish()
            raise
        if run is not None:
            run.finish()
    return result


def add_arguments(parser):
    """The plug-in's flags, with the names of launch/arguments.py; returns the parser, as Megatron
    wants it.
    """
    group = parser.add_argument_group("commute", "when each domain is used (megatron_commute)")
    group.add_argument(
        "--commute", metavar="FILE", default=None, help="mixture file; without it the plug-in does nothing"
    )
    group.add_argument(
        "--commute-accept", action="store_true", help="a changed mixture file holds from the checkpoint on"
    )
    group.add_argument(
        "--commute-attach", action="store_true", help="take over a run that began without --commute"
    )
    return parser
