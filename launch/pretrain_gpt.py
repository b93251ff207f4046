"""Pretrain a GPT with megatron-core's GPTModel under a DeepSpeed engine; `--commute FILE` adds the
plug-in.

Started by the deepspeed launcher (see quickstart.sh), on CPU with gloo or on GPUs with nccl. Flags
carry Megatron's names. Without --commute the data path is megatron-core's own blended dataset.
"""

import contextlib
import datetime
import json
import logging
import os
import shutil
import sys

import numpy as np
from arguments import checkpoint_of, parse, prepare

from megatron_commute.settings import rates, text_files

KEPT_WORDS = ("normalization", "position_embedding_type", "lr_decay_style", "lr_wsd_decay_style")


def learning_rate(args, step):
    """Rate of step `step` (0-based), Megatron's: the first step of a warm-up has the rate
    --lr-warmup-init.
    """
    return rates.rate(rates.from_flags(vars(args)), step)


def engine_config(args, data_parallel, universal=False):
    """DeepSpeed's configuration: the file's, with batch sizes and precision from the flags.
    universal: of restart.Choice.
    """
    config = text_files.read_object(args.deepspeed_config)
    config["train_micro_batch_size_per_gpu"] = args.micro_batch_size
    config["gradient_accumulation_steps"] = args.global_batch_size // (args.micro_batch_size * data_parallel)
    config["steps_per_print"] = 10**9
    config["zero_allow_untested_optimizer"] = True
    if args.bf16:
        config["bf16"] = {"enabled": True}
    if universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def build_engine(args, data_parallel, universal=False):
    """GPTModel, AdamW (no decay on biases and norms, as in Megatron) and the DeepSpeed engine
    around them.
    """
    import deepspeed
    import torch

    from megatron_commute.adapters import megatron_core

    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    model = megatron_core.gpt_model(args, args.padded_vocab_size)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_config(args, data_parallel, universal),
        mpu=megatron_core.deepspeed_mpu(),
    )
    return engine


def slices(start, stop, micro_batch, rank, size):
    """Micro-batches of this data-parallel rank from the global sample stream, sliced as Megatron
    slices.
    """
    for first in range(start, stop, micro_batch * size):
        yield list(range(first + rank * micro_batch, first + (rank + 1) * micro_batch))


def loader(args, plugin, groups, start):
    """An iterator over this rank's micro-batches from iteration `start` on: the plug-in's, or
    megatron-core's own.
    """
    import torch

    from megatron_commute import reduce
    from megatron_commute.adapters import megatron_core

    if plugin is not None and plugin.feeds:
        dataset, batches = plugin.dataset, plugin.sampler
    else:
        total, batch = args.train_iters * args.global_batch_size, args.global_batch_size
        dataset = megatron_core.stock_dataset(
            args.train_data_path, total, args.seq_length, args.vocab_size, args.seed, args.data_cache_path
        )
        place = (reduce.rank_in(groups.data), reduce.size(groups.data))
        batches = slices(start * batch, total, args.micro_batch_size, *place)
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=args.num_workers))


def train_step(engine, batches, args, step, data_rank):
    """One optimiser step over gradient-accumulation micro-batches; returns them with their
    per-sequence losses.
    """
    from megatron_commute.adapters import megatron_core

    # dropout is a function of the step, so resume is exact, and alike on all ranks that share a
    # replica's activations
    megatron_core.seed_dropout(args.seed + step * 65536 + data_rank)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(args, step)
    seen = []
    for _ in range(engine.gradient_accumulation_steps()):
        batch = next(batches)
        tokens, labels = batch["tokens"], batch.get("labels")
        if labels is None:
            tokens, labels = tokens[:, :-1], tokens[:, 1:]
        losses = megatron_core.token_losses(engine, tokens.to(engine.device), labels.to(engine.device))
        engine.backward(losses.mean())
        engine.step()
        seen.append((batch, losses.detach().double().mean(dim=1).cpu().numpy()))
    return seen


def validate(engine, datasets, args, groups):
    """Mean loss of every domain over --eval-iters global batches of its first sequences."""
    import torch

    from megatron_commute import reduce
    from megatron_commute.adapters import megatron_core

    totals = np.zeros((len(datasets), 2))
    engine.eval()
    with torch.no_grad():
        for k, dataset in enumerate(datasets):
            most = min(len(dataset), args.eval_iters * args.global_batch_size)
            mine = range(reduce.rank_in(groups.data), most, reduce.size(groups.data))
            for first in range(0, len(mine), args.micro_batch_size):
                items = [dataset[i]["tokens"] for i in mine[first : first + args.micro_batch_size]]
                tokens = torch.stack(items).to(engine.device)
                totals[k] += float(megatron_core.mean_loss(engine, tokens).double()) * len(items), len(items)
    engine.train()
    totals = reduce.sum_of_numbers(totals, groups.data)
    return [float(total / count) for total, count in totals]


def scalars(directory, plan):
    """A listener of the record that writes the curves of its lines
    (megatron_commute/report/curves.py) to TensorBoard.
    """
    from torch.utils.tensorboard import SummaryWriter

    from megatron_commute.report import curves

    writer = SummaryWriter(directory)

    def listen(line):
        for name, value in curves.of(line, plan.names, plan.budgets):
            writer.add_scalar(f"commute/{name}", value, line["step"])
        writer.flush()

    return curves.safe(listen)


def resume(engine, args, checkpoint):
    """(iterations done, plug-in state) of the chosen checkpoint under --load; (0, None) where there
    is none.
    """
    from megatron_commute.adapters import restart

    kept = restart.load(engine, args.load, checkpoint)
    if kept is None:
        return 0, None
    return kept["iteration"], json.loads(kept["commute"]) if kept.get("commute") else None


def save(engine, args, iteration, hook):
    state = {"iteration": iteration, "commute": json.dumps(hook.state_dict()) if hook is not None else None}
    # what `megatron-commute analyze` must know of the model and its schedule; paths are left out
    kept = {name: value for name, value in vars(args).items() if isinstance(value, bool | int | float)}
    kept |= {name: getattr(args, name) for name in KEPT_WORDS}
    state["arguments"] = json.dumps(kept)
    engine.save_checkpoint(args.save, tag=f"global_step{iteration}", client_state=state)


def log(done, args, engine, groups, hook, valid, losses, bar):
    """After `done` steps: the loss line, the progress bar and, at its interval, the validation of
    every domain.
    """
    found = None
    evaluated = valid[1] and (done % args.eval_interval == 0 or done in (0, args.train_iters))
    if evaluated:
        found = dict(zip(valid[0], validate(engine, valid[1], args, groups), strict=True))
    if not evaluated and done % args.log_interval:
        return
    mean = sum(losses) / len(losses) if losses else None
    losses.clear()
    shown = {"loss": f"{mean:.3f}"} if mean else {}
    if hook is not None:
        hook.log_losses(done, found)
        shown["weights"] = "/".join(f"{w:.2f}" for w in hook.weights)
    bar.set_postfix(shown)
    if hook is None and found and not bar.disable:
        bar.write(f"step {done}: validation " + ", ".join(f"{n} {x:.4f}" for n, x in found.items()))


def train(args, engine, plugin, valid, checkpoint):
    from tqdm import tqdm

    from megatron_commute import reduce
    from megatron_commute.adapters import megatron_core

    groups, first = megatron_core.groups(), reduce.rank() == 0
    start, state = resume(engine, args, checkpoint)
    bar = tqdm(total=args.train_iters, initial=start, disable=not first, unit="step", dynamic_ncols=True)
    hook = batches = None
    if plugin is not None:
        hook = attach(args, engine, plugin, groups, start, state, bar)
    elif state is not None and first:
        at = start * args.global_batch_size
        bar.write(f"NOTE: trained with --commute up to here; the stock blend goes on at its own sample {at}")
    if start < args.train_iters:
        batches = loader(args, plugin, groups, start)
    losses = []
    if start == 0 or (hook is not None and state is None):
        log(start, args, engine, groups, hook, valid, losses, bar)
    for step in range(start, args.train_iters):
        if hook is not None:
            hook.begin(step)
        seen = train_step(engine, batches, args, step, groups.data_rank)
        losses.extend(loss.mean() for _, loss in seen)
        if hook is not None:
            account(hook, seen)
        bar.update()
        log(step + 1, args, engine, groups, hook, valid, losses, bar)
        if step + 1 == args.train_iters and hook is not None:
            hook.finish(step + 1)
        if args.save and (
            step + 1 == args.train_iters or (args.save_interval and (step + 1) % args.save_interval == 0)
        ):
            save(engine, args, step + 1, hook)
    bar.close()
    if plugin is not None and first:
        print(plugin.summary(args.save or "."))


def attach(args, engine, plugin, groups, start, state, bar):
    """The hook of this run; a checkpoint that does not fit the mixture file ends it with exit
    status 2.
    """
    from megatron_commute.adapters import megatron_core
    from megatron_commute.config import ConfigError

    wanted = args.tensorboard_dir and not bar.disable
    listeners = (scalars(args.tensorboard_dir, plugin.plan),) if wanted else ()
    try:
        return plugin.attach(
            megatron_core.probe_model(engine, args.micro_batch_size, plugin.config.probe.method),
            groups,
            args.save or ".",
            lambda step: learning_rate(args, step),
            args.weight_decay,
            vocab_size=args.vocab_size,
            state=state,
            consumed=start * args.global_batch_size,
            accept=args.commute_accept,
            take_over=args.commute_attach,
            listeners=listeners,
            say=bar.write if not bar.disable else lambda line: None,
        )
    except ValueError as error:
        kind = "error" if isinstance(error, ConfigError) else f"error: {plugin.config.file}"
        if not bar.disable:
            print(f"{kind}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def account(hook, seen):
    """Tell the hook what this step trained on."""
    tokens = np.concatenate([batch["tokens"].numpy() for batch, _ in seen])
    losses = np.concatenate([loss for _, loss in seen])
    delivered = None
    if "position" in seen[0][0]:
        delivered = tuple(
            np.concatenate([batch[key].numpy() for batch, _ in seen]) for key in ("domain", "position")
        )
    hook.end(losses, tokens, delivered)


def main(argv=None):
    args = parse(argv)
    world, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    plugin, valid = prepare(args, world)  # refusals come before anything is imported, started or written
    with checkpoint_of(args, world, rank) as checkpoint:
        run(args, world, rank, plugin, valid, checkpoint)


def run(args, world, rank, plugin, valid, checkpoint):
    """Start torch.distributed and the engine, and train."""
    for name in ("torch.utils.cpp_extension", "megatron.core"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their notes about absent CUDA parts, once a rank
    import deepspeed
    import torch

    from megatron_commute.adapters import alike, megatron_core, restart
    from megatron_commute.config import ConfigError

    if shutil.which(os.environ.get("CXX") or "c++") is None:
        # DeepSpeed would die building its CPU operator; gloo does the work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = args.distributed_timeout_minutes
    with restart.explained(rank, world, args.save):
        with contextlib.redirect_stdout(sys.stderr):
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            deepspeed.init_distributed(backend, timeout=datetime.timedelta(minutes=limit))
        if plugin is not None:
            try:
                alike.refuse_unlike(alike.facts(plugin.config))
            except ConfigError as error:
                if os.environ.get("LOCAL_RANK", "0") == "0":
                    print(f"error: {error}", file=sys.stderr)
                raise SystemExit(2) from None
        megatron_core.initialise(args.tensor_model_parallel_size, args.seed, limit)
        engine = build_engine(args, world // args.tensor_model_parallel_size, checkpoint.universal)
        train(args, engine, plugin, valid, checkpoint)


if __name__ == "__main__":
    main()
