"""The trainer's command line, with Megatron's names, and all that is refused before anything is
started or written.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

from megatron_commute.settings import rates


def parse(argv):
    parser = argparse.ArgumentParser(
        description="Pretrain a GPT on megatron-core under DeepSpeed.", allow_abbrev=False
    )
    for flag, kind, default in (
        ("num-layers", int, 4), ("hidden-size", int, 128), ("ffn-hidden-size", int, None),
        ("num-attention-heads", int, 4), ("num-query-groups", int, 1), ("seq-length", int, 256),
        ("max-position-embeddings", int, None), ("vocab-size", int, 4096),
        ("make-vocab-size-divisible-by", int, 128), ("init-method-std", float, 0.02),
        ("hidden-dropout", float, 0.1), ("attention-dropout", float, 0.1),
        ("tensor-model-parallel-size", int, 1), ("micro-batch-size", int, 4), ("global-batch-size", int, 16),
        ("train-iters", int, 100), ("weight-decay", float, 0.01), ("adam-beta1", float, 0.9),
        ("adam-beta2", float, 0.999), ("adam-eps", float, 1e-8), ("seed", int, 1234), ("num-workers", int, 2),
        ("log-interval", int, 10), ("eval-interval", int, 100), ("eval-iters", int, 4),
        ("save-interval", int, 0), ("save", str, None), ("load", str, None), ("tensorboard-dir", str, None),
        ("data-cache-path", str, None),
        ("deepspeed_config", str, str(Path(__file__).with_name("ds_zero1.json"))), ("commute", str, None),
        ("local_rank", int, 0), ("distributed-timeout-minutes", float, 10.0),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=kind, default=default)
    for flag in rates.FLAGS:
        kind = {"type": flag.kind, "choices": flag.choices or None, "help": flag.help}
        parser.add_argument(f"--{flag.name}", default=flag.default, **kind)
    parser.set_defaults(lr=1e-3)
    parser.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    parser.add_argument(
        "--position-embedding-type", choices=("learned_absolute", "rope"), default="learned_absolute"
    )
    for flag in (
        "bf16",
        "swiglu",
        "group-query-attention",
        "untie-embeddings-and-output-weights",
        "disable-bias-linear",
        "deepspeed",
    ):
        parser.add_argument(f"--{flag}", action="store_true")
    parser.add_argument(
        "--commute-accept", action="store_true", help="a changed mixture file holds from the checkpoint on"
    )
    parser.add_argument(
        "--commute-attach", action="store_true", help="take over a run that began without --commute"
    )
    parser.add_argument("--train-data-path", nargs="+", default=[], help="WEIGHT PREFIX pairs, as Megatron's")
    parser.add_argument(
        "--valid-data-path", nargs="+", default=[], help="WEIGHT PREFIX pairs, one for each domain"
    )
    args = parser.parse_args(argv)
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    args.max_position_embeddings = args.max_position_embeddings or args.seq_length
    return args


def prepare(args, world):
    """Plug-in (None without --commute) and validation sets. What does not fit `world` ranks or the
    data ends here, with one line and exit status 2.
    """
    from megatron_commute.adapters.torch_loop import Plugin
    from megatron_commute.config import ConfigError, Run
    from megatron_commute.data.indexed import DataError

    try:
        refuse(args, world)
        run = Run(
            seq_length=args.seq_length,
            global_batch=args.global_batch_size,
            micro_batch=args.micro_batch_size,
            data_parallel=world // args.tensor_model_parallel_size,
            train_iters=args.train_iters,
            prefetched=2 * args.num_workers,
        )
        plugin = Plugin(args.commute, run, args.train_data_path) if args.commute else None
        if not args.train_data_path and (plugin is None or not plugin.feeds):
            raise ConfigError(
                "--train-data-path: missing, and nothing else feeds training; write WEIGHT PREFIX pairs"
            )
        return plugin, validation_sets(args, plugin.plan.names if plugin else None)
    except (ConfigError, DataError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node, as files may be missing on one of them
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def checkpoint_of(args, world, rank):
    """The restart.Choice of this job, which is the only one to write into --save meanwhile; rank 0
    converts a checkpoint of another data-parallel size. What cannot go on ends here, with one line
    and exit status 2.
    """
    from megatron_commute.adapters import restart

    tensor = args.tensor_model_parallel_size
    stage = zero_stage(args.deepspeed_config)
    with contextlib.ExitStack() as held:
        try:
            if rank == 0 and args.save:
                held.enter_context(restart.only_job(args.save))
            told = restart.choose(args.load, world // tensor, tensor, stage, rank == 0, _say)
        except restart.RestartError as error:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _say(f"error: {error}")
            raise SystemExit(2) from None
        yield told


def zero_stage(path):
    """Stage of ZeRO in a DeepSpeed configuration. Raises ValueError for what is none."""
    from megatron_commute.settings import text_files

    zero = text_files.read_object(path).get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in range(4):
        raise ValueError(f'{path}: names no stage of ZeRO; write "zero_optimization": {{"stage": 1}}')
    return stage


def _say(line):
    print(line, file=sys.stderr)


def refuse(args, world):
    """Raise ConfigError for flags that no run on `world` ranks can have."""
    from megatron_commute.config import ConfigError

    for flag in (
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "train_iters",
        "tensor_model_parallel_size",
        "log_interval",
        "eval_interval",
        "eval_iters",
    ):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: write a positive number")
    try:
        rates.from_flags(vars(args))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not args.distributed_timeout_minutes > 0:
        raise ConfigError("--distributed-timeout-minutes: write a positive number")
    try:
        zero_stage(args.deepspeed_config)
    except ValueError as error:
        raise ConfigError(f"--deepspeed_config {error}, as launch/ds_zero1.json does") from None
    if args.num_workers < 0 or args.save_interval < 0:
        raise ConfigError("--num-workers and --save-interval: write 0 or a positive number")
    tensor = args.tensor_model_parallel_size
    if world % tensor:
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor}: does not divide the {world} ranks; change one of them"
        )
    chunk = args.micro_batch_size * (world // tensor)
    if args.global_batch_size % chunk:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size}: not a multiple of --micro-batch-size x "
            f"data-parallel ranks = {chunk}; change one of them or the number of ranks"
        )


def validation_sets(args, names):
    """(names, datasets) of --valid-data-path, one for each domain of the mixture file where there
    is one.
    """
    from megatron_commute.config import ConfigError
    from megatron_commute.data import blend
    from megatron_commute.data.indexed import TokenSequences

    if not args.valid_data_path:
        return [], []
    prefixes, _ = blend.read(args.valid_data_path, "--valid-data-path")
    if names and len(names) != len(prefixes):
        raise ConfigError(
            f"--valid-data-path: {len(prefixes)} domains, the mixture file has {len(names)}; write one pair "
            "for each"
        )
    datasets = [TokenSequences([prefix], args.seq_length) for prefix in prefixes]
    for prefix, dataset in zip(prefixes, datasets, strict=True):
        if not len(dataset):
            raise ConfigError(
                f"--valid-data-path: {prefix} holds no whole sequence; add text or shorten --seq-length"
            )
    return names or [Path(p).name for p in prefixes], datasets
