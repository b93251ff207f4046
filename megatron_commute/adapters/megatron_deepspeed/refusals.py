"""What of Megatron-DeepSpeed this plug-in does not follow: refused by name before the model is
built, with the cure.
"""

import json
from pathlib import Path

from megatron_commute.config import ConfigError

_FLAGS = (
    # (flag, whether `args` has it on, what is wrong with it, cure)
    (
        "--num-experts",
        lambda a: max(_numbers(a, "num_experts", 1)) > 1,
        "tokens change their expert between the two points of a difference, which in a trial put P off by "
        "3.8 times the largest M, and with deepspeed 0.19 this host cannot save a checkpoint of it",
        "train a dense model",
    ),
    (
        "--ds-sequence-parallel-size",
        lambda a: (
            max(_numbers(a, "ds_sequence_parallel_size", 1)) > 1 or _on(a, "force_ds_sequence_parallel")
        ),
        "probes draw whole sequences, Ulysses splits them over ranks",
        "use --tensor-model-parallel-size or --pipeline-model-parallel-size",
    ),
    (
        "--ds-sequence-parallel-fpdt",
        lambda a: _on(a, "ds_sequence_parallel_fpdt"),
        "probes draw whole sequences",
        "drop it",
    ),
    (
        "--sequence-parallel",
        lambda a: _on(a, "sequence_parallel"),
        "this host splits sequences twice, so that a GPTModel ends in its first forward pass, and in "
        "pipelines leaves gradients of norms apart on each rank, so that there is no one model to measure",
        "drop it",
    ),
    (
        "--data-efficiency-curriculum-learning",
        lambda a: _on(a, "data_efficiency_curriculum_learning"),
        "its sampler draws other samples than the mixture",
        "drop it, and data_efficiency in --deepspeed_config",
    ),
    (
        "--random-ltd",
        lambda a: _on(a, "random_ltd"),
        "layers that skip tokens at random have no fixed loss to measure",
        "drop it",
    ),
    (
        "--dataloader-type cyclic",
        lambda a: a.dataloader_type not in (None, "single"),
        "it draws samples at random, so that nothing tells which domain comes next",
        "write --dataloader-type single",
    ),
    (
        "--repeated-dataloader",
        lambda a: _on(a, "repeated_dataloader"),
        "it begins the data anew at its end",
        "drop it",
    ),
    (
        "--fp16-lm-cross-entropy",
        lambda a: _on(a, "fp16_lm_cross_entropy"),
        "probes run in float32, which it refuses",
        "drop it",
    ),
    (
        "--variable-seq-lengths",
        lambda a: _on(a, "variable_seq_lengths"),
        "budgets count sequences of one length",
        "drop it",
    ),
    (
        "--num-layers-per-virtual-pipeline-stage",
        lambda a: getattr(a, "virtual_pipeline_model_parallel_size", None) is not None,
        "interleaved stages are not followed",
        "drop it",
    ),
    (
        "--enable-zbh1-pipeline",
        lambda a: _on(a, "enable_zbh1_pipeline"),
        "its schedule is not followed",
        "drop it",
    ),
    (
        "--mos/--kd",
        lambda a: _on(a, "mos") or _on(a, "kd"),
        "the loss depends on a teacher, which probes do not follow",
        "drop it",
    ),
    (
        "--retro-add-retriever",
        lambda a: _on(a, "retro_add_retriever"),
        "its data path is another one",
        "drop it",
    ),
    ("--return-data-index", lambda a: _on(a, "return_data_index"), "it is for data analysis", "drop it"),
    (
        "--train-data-exact-num-epochs",
        lambda a: getattr(a, "train_data_exact_num_epochs", None) is not None,
        "the mixture file says how much of each domain is used",
        "drop it, and write budgets",
    ),
    (
        "--no-deepspeed",
        lambda a: not _on(a, "deepspeed"),
        "engine and checkpoints are followed through DeepSpeed",
        "add --deepspeed --deepspeed_config FILE",
    ),
    (
        "--skip-train",
        lambda a: _on(a, "skip_train") or _on(a, "inference"),
        "nothing is trained",
        "drop --commute",
    ),
    (
        "--data-impl",
        lambda a: getattr(a, "data_impl", "mmap") not in ("mmap", "infer"),
        "only indexed data of the mmap kind is read",
        "write --data-impl mmap",
    ),
)


_SUPPORTED = "pretrain_gpt.py"
_OTHER_SCRIPTS = ("pretrain_bert.py", "pretrain_t5.py")


def refuse_script(forward_step):
    """Raise ConfigError for the host's scripts of other models; forward_step: the script's own. A
    script of the user's is taken for one like pretrain_gpt.py.
    """
    script = Path(getattr(getattr(forward_step, "__code__", None), "co_filename", "")).name
    if script in _OTHER_SCRIPTS:
        raise ConfigError(
            f"--commute: {script} is not supported, probes know the loss of a GPT alone; use {_SUPPORTED}"
        )


def refuse(args, feeds=False):
    """Raise ConfigError where the run cannot be followed.

    args: Megatron's own after validation. feeds: whether the mixture file, rather than the host's
    blend, feeds training.
    """
    for flag, on, why, cure in _FLAGS:
        if on(args):
            raise ConfigError(f"{flag}: not supported by --commute: {why}; {cure}")
    engine = json.loads(Path(args.deepspeed_config).read_text()) if args.deepspeed_config else {}
    for key in ("curriculum_learning", "data_efficiency", "compression_training"):
        if engine.get(key) and engine[key].get("enabled", True):
            raise ConfigError(
                f"{args.deepspeed_config}: {key} is not supported by --commute: it changes the sequences or "
                "the model in the course of training; take it out"
            )
    if feeds and args.data_path and _leaves_out(args.split):
        raise ConfigError(
            f"--split {args.split}: modes fixed and act train on whole domains, so that documents kept for "
            "validation would be trained on; give validation data of its own with --train-data-path and "
            "--valid-data-path, or write --split 100,0,0"
        )
    if not feeds and not (args.data_path or args.train_data_path):
        raise ConfigError(
            "--data-path: missing, and mode shadow leaves training to the host's own blend; write WEIGHT "
            "PREFIX pairs"
        )


def _on(args, name):
    return bool(getattr(args, name, False))


def _numbers(args, name, default):
    value = getattr(args, name, default) or default
    return list(value) if isinstance(value, list | tuple) else [value]


def _leaves_out(split):
    """Whether a --split such as 969,30,1 keeps documents from training."""
    parts = [float(part) for part in str(split).replace("/", ",").split(",") if part]
    return sum(parts[1:]) > 0
