"""What an analysis of checkpoints is asked for, and how mixture file, flags of the checkpoint and
data fit together.
"""

import dataclasses

import numpy as np

from megatron_commute.adapters import torch_loop
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.config import Config, ConfigError, Plan, Run
from megatron_commute.data.indexed import data_summary, drawer
from megatron_commute.mixture import Mixture
from megatron_commute.settings import text_files, yaml_checks
from megatron_commute.settings.probe_cost import holdout_parts, sequences_drawn

_COUNTS = (  # flags of a checkpoint that are whole numbers
    "iteration", "train_iters", "global_batch_size", "micro_batch_size", "seq_length", "vocab_size",
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "max_position_embeddings", "make_vocab_size_divisible_by", "tensor_model_parallel_size",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What overrides the mixture file and the checkpoints' own flags; None: as they say."""

    samples: int | None = None
    # of probe.samples
    splits: int | None = None
    # of probe.splits
    method: str | None = None
    # of probe.method
    metric: str | None = None
    # of probe.metric
    target: str | dict | None = None
    # "each" or {name: share}
    tokens: int | None = None
    # length of the run
    train_iters: int | None = None
    # likewise, in steps
    micro_batch: int | None = None
    # sequences of a forward pass of the probe
    arguments: str | None = None
    # a JSON file of flags for checkpoints that keep none


def asked(target=None, **options):
    """The Asked of command-line options; target: "each" or NAME=SHARE,NAME=SHARE. Raises
    ConfigError.
    """
    if target is None or target == "each":
        return Asked(target=target, **options)
    shares = {}
    for part in target.split(","):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            raise ConfigError(f"--target {target}: write `each`, or NAME=SHARE,NAME=SHARE") from None
    return Asked(target=shares, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One analysis."""

    config: Config
    # the mixture file with what was asked for
    plan: Plan
    # of the run
    run: Run
    # its size
    fresh: Mixture
    # its stream at sample 0
    vocabulary: int | None
    # tokens that the model knows
    notes: list
    # what people should know of it


def extra_flags(asked):
    """{flag: value} of --arguments."""
    if asked.arguments is None:
        return {}
    try:
        found = text_files.read_object(asked.arguments, "a JSON object of flags")
    except text_files.TextFileError as fault:
        raise CheckpointError(f"--arguments {fault}") from None
    for flag, value in found.items():
        if flag in _COUNTS and value is not None:
            found[flag] = yaml_checks.whole(value)
            if found[flag] is None or found[flag] < (flag != "iteration"):
                told = f"{flag} is {yaml_checks.shown(value)}; write a positive whole number"
                raise CheckpointError(f"--arguments {asked.arguments}: {told}")
    return found


def setting(checkpoint, data, asked):
    """The Setting of an analysis that begins with `checkpoint`. Raises CheckpointError and
    ConfigError.
    """
    flags = checkpoint.arguments
    batch = getattr(flags, "global_batch_size", None)
    if not batch:
        raise CheckpointError(
            f"{checkpoint.folder}: names no global_batch_size; name it with --arguments FILE"
        )
    iters = asked.train_iters or getattr(flags, "train_iters", None)
    if asked.tokens:
        iters = -(-asked.tokens // (batch * flags.seq_length))
    if not iters:
        raise CheckpointError(
            f"{checkpoint.folder}: does not say how long the run is; write --train-iters or --tokens"
        )
    micro = asked.micro_batch or min(getattr(flags, "micro_batch_size", None) or 1, batch)
    # budgets and shares need the run's own batch, the probe may take another micro-batch
    fitting = micro if batch % micro == 0 else 1
    run = Run(
        seq_length=flags.seq_length,
        global_batch=batch,
        micro_batch=fitting,
        data_parallel=1,
        train_iters=iters,
    )
    plugin = torch_loop.Plugin(data, run)
    config = _overridden(plugin.config, asked)
    plan = plugin.plan
    if asked.target is not None:
        plan = dataclasses.replace(plan, targets=_targets(config, asked.target))
    for name, held in zip(plan.names, plan.holdouts, strict=True):
        parts = holdout_parts(held)
        samples, splits = config.probe.samples, config.probe.splits
        most = min(len(parts.gradients), 2 * len(parts.direction)) // splits * splits
        if samples > most or sequences_drawn(config.probe)["direction"] > len(parts.direction):
            raise ConfigError(
                f"--samples {samples}: the holdout of {name} has {held} sequences; write {most} or less, or "
                "name a longer holdout file"
            )
    vocabulary = getattr(flags, "vocab_size", None)
    notes = _compare_with_run(plugin, plan, checkpoint)
    if not getattr(flags, "lr", None):
        notes.append(
            "nothing names the learning rate, so each of the two windows counts as one unit of flow time "
            "and predicted effects have no scale: name lr, lr_decay_style and lr_warmup_iters with "
            "--arguments"
        )
    _check_vocabulary(config, plan, run, checkpoint, vocabulary)
    return Setting(
        config=config,
        plan=plan,
        run=run,
        fresh=plugin.mixture(),
        vocabulary=vocabulary,
        notes=notes,
    )


def _overridden(config, asked):
    """The mixture file's probe with what was asked for. Raises ConfigError."""
    wanted = {key: getattr(asked, key) for key in ("samples", "splits", "method", "metric")}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    settings = dataclasses.replace(config.probe, time_limit=None, **wanted)
    if settings.splits < 2:
        raise ConfigError(
            f"--splits {settings.splits}: write 2 or more, standard errors come from the splits"
        )
    if settings.samples < 1 or settings.samples % settings.splits:
        fitting = max(1, -(-settings.samples // settings.splits)) * settings.splits
        raise ConfigError(
            f"--samples {settings.samples}: is not divisible by the {settings.splits} splits; write "
            f"{fitting}, or another --splits"
        )
    return dataclasses.replace(config, probe=settings)


def _targets(config, target):
    if target == "each":
        return np.eye(len(config.names))
    for name in target:
        if name not in config.names:
            raise ConfigError(f"--target {name}: no such domain; write one of {', '.join(config.names)}")
    shares = np.array([[target.get(name, 0.0) for name in config.names]], dtype=np.float64)
    if not (shares >= 0).all() or not shares.sum() > 0:
        raise ConfigError(
            "--target: write `each`, or NAME=SHARE,NAME=SHARE with shares that are not negative"
        )
    return shares / shares.sum()


def _compare_with_run(plugin, plan, checkpoint):
    """Notes on how this mixture file differs from the run's own. Raises CheckpointError for other
    domains.
    """
    live = ("measure_budget", "every")  # what concerns probes of a running job only
    notes = [text for text in plan.warnings if not text.startswith(live)]
    state = checkpoint.commute
    if state is None:
        if not all(isinstance(domain.holdout, str) for domain in plugin.config.domains):
            notes.append(
                "the run was trained without the plug-in, so it may have been trained on the last "
                "sequences of every domain which serve as holdout here: name holdout files of their own "
                "for honest numbers"
            )
        return notes
    names = state["ledger"]["names"]
    if list(names) != list(plan.names):
        raise ConfigError(
            f"{checkpoint.folder}: its run has the domains {', '.join(names)}, --data names "
            f"{', '.join(plan.names)}; name the run's own mixture file"
        )
    if state["config"] != plugin.config.digest:
        notes.append("the mixture file is not the one that the run had when it wrote the checkpoint")
    return notes


def _check_vocabulary(config, plan, run, checkpoint, vocabulary):
    """Raises CheckpointError where the held-out tokens cannot be the model's."""
    rows = len(checkpoint.parameters["embedding.word_embeddings.weight"])
    for domain in config.domains:
        said = data_summary(domain.path).vocab_size
        padded = said is not None and vocabulary == rows > said  # Hugging Face says the rows alone
        if said is not None and vocabulary is not None and said != vocabulary:
            raise ConfigError(
                f"{config.file}: {domain.path[0]}.json says a vocabulary of {said}, the model has one of "
                f"{vocabulary}; prepare the data with the model's tokenizer"
                + (", or, where its rows are padded, name vocab_size with --arguments" if padded else "")
            )
    draw = drawer(config, plan, run.seq_length, vocabulary or rows)
    try:
        for k in range(len(plan.names)):
            draw("gradient", k, np.arange(config.probe.samples))
    except ValueError as fault:
        raise ConfigError(f"{config.file}: {fault}") from None
