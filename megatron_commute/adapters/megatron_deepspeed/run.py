"""One training run of Megatron-DeepSpeed with --commute: the wrappers around what
megatron.training calls in its course.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_commute import reduce
from megatron_commute.adapters import alike, megatron_core, torch_loop
from megatron_commute.adapters.megatron_deepspeed import length
from megatron_commute.adapters.megatron_deepspeed import model as models
from megatron_commute.adapters.megatron_deepspeed.refusals import refuse, refuse_script
from megatron_commute.adapters.megatron_deepspeed.sight import Sight, harmless
from megatron_commute.config import ConfigError, Run
from megatron_commute.data import blend, takeover
from megatron_commute.data.indexed import DataError

KEY = "commute"  # of the state in a checkpoint's client_state
TIMER = "commute-probe"


@contextlib.contextmanager
def replaced(module, **functions):
    """Other functions under these names of a module, for a time."""
    kept = {name: getattr(module, name, None) for name in functions}
    missing = [name for name, found in kept.items() if found is None]
    if missing:
        raise RuntimeError(
            f"{module.__name__} has no {', '.join(missing)}: this Megatron-DeepSpeed is not one that the "
            "plug-in knows; run `megatron-commute patch PATH --check`"
        )
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


class _Plugin(torch_loop.Plugin):
    """The plug-in's stream in mode shadow has the host's own rounding of weights, so that it
    names every sample's domain.
    """

    def mixture(self):
        stream = super().mixture()
        if self.feeds or len(self.host_blend) < 2:
            return stream
        return type(stream)(takeover.stock_weights(blend.read(self.host_blend)[1]))


class _Texts(torch.utils.data.Dataset):
    """Our sequences under the name that Megatron's batches have: {"text": i64[s + 1], "domain",
    "position"}.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        sample = self.dataset[key]
        return {"text": sample["tokens"], "domain": sample["domain"], "position": sample["position"]}


class TrainingRun:
    """One training run: what was read from the mixture file, and the wrappers around
    megatron.training's functions.
    """

    def __init__(self, args, forward_step):
        self.args = args
        # of record and report; beside the mixture file where no checkpoints are kept
        self.folder = args.save or str(Path(f"{args.commute}.run").resolve())
        self.kept = self.hook = self.engine = self.scheduler = self.valid = None
        self.plugin, facts = _agreed(lambda: self._read(forward_step))
        _or_exit(lambda: alike.refuse_unlike(facts), args.commute)
        self.sight = self.host = None

    def _read(self, forward_step):
        args = self.args
        refuse_script(forward_step)
        run = Run(
            seq_length=args.seq_length,
            global_batch=args.global_batch_size,
            micro_batch=args.micro_batch_size,
            data_parallel=args.data_parallel_size,
            train_iters=length.steps_of_run(args),
            prefetched=2 * args.num_workers,
            rampup=length.rampup(args),
        )
        flag = "--train-data-path" if args.train_data_path else "--data-path"
        plugin = _Plugin(args.commute, run, args.train_data_path or args.data_path or (), flag)
        refuse(args, plugin.feeds)
        return plugin, alike.facts(plugin.config)

    @contextlib.contextmanager
    def installed(self, training):
        """Wrap what megatron.training calls in the course of a run."""
        names = (
            "setup_model_and_optimizer",
            "load_checkpoint",
            "build_train_valid_test_data_iterators",
            "train_step",
            "build_pretraining_data_loader",
            "evaluate_and_print_results",
        )
        self.host = {name: getattr(training, name) for name in names}
        with replaced(training, **{name: getattr(self, name) for name in names}):
            yield self

    def load_checkpoint(self, model, *args, **named):
        """Keep our part of the client state of the checkpoint that Megatron loads."""
        engine, load = model[0], model[0].load_checkpoint

        def loaded(*given, **named_too):
            path, state = load(*given, **named_too)
            if state and state.get(KEY):
                self.kept = json.loads(state[KEY])
            return path, state

        engine.load_checkpoint = loaded
        try:
            return self.host["load_checkpoint"](model, *args, **named)
        finally:
            del engine.load_checkpoint

    def setup_model_and_optimizer(self, *args, **named):
        """Put our state beside the host's in every checkpoint that this engine writes."""
        model, optimizer, self.scheduler = self.host["setup_model_and_optimizer"](*args, **named)
        self.engine, save = model[0], model[0].save_checkpoint

        def saved(folder, tag=None, client_state=None, *rest, **named_too):
            state = dict(client_state or {})
            self.hook.settle()  # travels, so it is no part of what may fail on one rank alone
            with harmless("NO STATE OF --commute IN THIS CHECKPOINT, do not resume from it"):
                state[KEY] = json.dumps(self.hook.state_dict())
            return save(folder, tag, state, *rest, **named_too)

        self.engine.save_checkpoint = saved
        return model, optimizer, self.scheduler

    def build_train_valid_test_data_iterators(self, *args, **named):
        self.attach()
        return self.host["build_train_valid_test_data_iterators"](*args, **named)

    def build_pretraining_data_loader(self, dataset, consumed):
        """Of the three calls the first is for training; in mode shadow it is the host's own like
        the others.
        """
        if self.valid is None:
            self.valid = ()
            if not self.plugin.feeds:
                return self.host["build_pretraining_data_loader"](dataset, consumed)
            return torch.utils.data.DataLoader(
                _Texts(self.plugin.dataset),
                batch_sampler=self.plugin.sampler,
                num_workers=self.args.num_workers,
                pin_memory=True,
            )
        if self.valid == ():
            self.valid = getattr(dataset, "datasets", [dataset])
        return self.host["build_pretraining_data_loader"](dataset, consumed)

    def attach(self):
        """Build the hook; collective. The checkpoint, if any, is loaded already and no loader
        has been built yet.
        """
        from megatron import print_rank_0
        from megatron.core import parallel_state as mpu

        args, groups = self.args, megatron_core.groups()
        first_shard = mpu.get_tensor_model_parallel_rank() == 0
        ends = (
            mpu.is_pipeline_first_stage(ignore_virtual=True),
            mpu.is_pipeline_last_stage(ignore_virtual=True),
        )
        self.sight = Sight(*(first_shard and end for end in ends))
        consumed = args.consumed_train_samples or args.iteration * args.global_batch_size
        self.behind = 0  # until law flow has planned, so that a restart makes the same plan
        decay = models.decoupled_decay(self.engine, args.weight_decay)
        if args.weight_decay and not decay:
            print_rank_0(
                "note: this optimiser adds its weight decay to the gradient, where probes do not see it"
            )

        if not args.save:
            print_rank_0(f"no --save: the decision log and its report will lie in {self.folder}")

        def attached():
            length.refuse_other_steps(args, self.plugin.run, consumed)
            return self.plugin.attach(
                self._model(),
                groups,
                self.folder,
                models.learning_rate(
                    self.scheduler, self.plugin.run.batches, args.seq_length, lambda: self.behind
                ),
                decay,
                vocab_size=args.padded_vocab_size,
                state=self.kept if consumed else None,
                consumed=consumed,
                accept=args.commute_accept,
                take_over=args.commute_attach,
                origin=args.load,
                say=print_rank_0,
                listeners=self._scalars(),
            )

        self.hook = _or_exit(attached, self.plugin.config.file)
        # samples of steps that were left out, which the scheduler does not count
        self.behind = max(0, consumed - self.scheduler.num_steps) if args.fp16 else 0
        self.hook.tally.over(groups.world)

    def _model(self):
        """The probe.Model of this run."""
        method = self.plugin.config.probe.method
        return models.probe_model(self.engine, self.args.micro_batch_size, method)

    def _scalars(self):
        """Listeners of the record that write its curves: one on the last rank, which holds the
        host's writers.
        """
        from megatron_commute.adapters.megatron_deepspeed import scalars

        listener = None
        with harmless("no curves of --commute"):
            listener = scalars.listener(self.plugin.plan)
        return () if listener is None else (listener,)

    def train_step(self, forward_step, batches, model, *rest):
        """One step of the host's, between the two calls of the hook. The save comes later, so it
        holds what was consumed.
        """
        from megatron import get_timers

        step, config = self.args.curr_iteration, self.hook.config
        timers = get_timers() if step and step % config.every == 0 else None
        if timers:
            timers(TIMER, log_level=0).start()
        self.hook.begin(step)
        if timers:
            timers(TIMER).stop()
            timers.log([TIMER])
        sight, count = self.sight, len(self.hook.tally.mine)
        sight.begin()
        with sight.of_pipeline(model[0]):
            result = self.host["train_step"](
                sight.forward_step(forward_step), sight.over(batches), model, *rest
            )
        self.hook.end(sight.sequence_losses(count), sight.tokens(count), self._delivered())
        if skipped := result[1]:  # the loss scale was too large: the samples are consumed all the same
            self.hook.tally.skipped += skipped
            self.behind += len(self.hook.domains)
        done = step + 1
        evaluates = self.args.do_valid and self.args.eval_interval and done % self.args.eval_interval == 0
        if done % self.args.log_interval == 0 and not evaluates:
            self.hook.log_losses(done)
        return result

    def _delivered(self):
        """What this rank's loader brought, for the hook to check; the host's own tells the
        domain alone.
        """
        found = None
        with harmless("samples are not checked"):
            found = self.sight.delivered()
        if found is None:
            return None
        domain, position = found
        return domain, self.hook.positions[self.hook.tally.mine] if position is None else position

    def evaluate_and_print_results(self, prefix, forward_step, batches, model, iteration, *rest, **named):
        """The host's validation, with the loss of every domain where its validation data has the
        file's domains.
        """
        test, sight = named.get("test", False), self.sight
        sight.begin()
        with sight.of_pipeline(model[0]):
            self.host["evaluate_and_print_results"](
                prefix,
                sight.forward_step(forward_step),
                sight.over(batches),
                model,
                iteration,
                *rest,
                **named,
            )
        if test:
            return
        K = len(self.plugin.plan.names)
        sums = np.zeros((2, K))
        with harmless("validation losses of domains are not seen"):
            found, losses = (
                sight.delivered(),
                sight.sequence_losses(sum(len(b["text"]) for b in sight.batches)),
            )
            if losses is not None and len(self.valid) == K and (found is not None or K == 1):
                losses = losses.cpu().numpy()
                domain = found[0] if found is not None else np.zeros(len(losses), dtype=np.int64)
                sums[:] = np.bincount(domain, losses, K), np.bincount(domain, minlength=K)
        sums = reduce.sum_of_numbers(sums, self.hook.groups.world)
        seen = zip(self.plugin.plan.names, *sums, strict=True)
        valid = {name: float(total / count) for name, total, count in seen if count}
        self.hook.log_losses(iteration, valid or None)

    def finish(self):
        """After the last step of this job: the closing line, the report and its table."""
        from megatron import print_rank_0

        args = self.args
        if self.hook is None:
            return
        self.hook.finish(args.iteration, length.going_on(args))
        if reduce.rank() == 0:
            try:
                print_rank_0(self.plugin.summary(self.folder))
            except Exception as fault:  # training is complete and saved: its exit status is not ours to spoil
                print_rank_0(f"the report was not written: {type(fault).__name__}: {fault}")


def _or_exit(build, file):
    """build(), or one line on rank 0 of every node and exit status 2 where it raises ValueError."""
    try:
        return build()
    except (ConfigError, DataError, ValueError) as error:
        told = error if isinstance(error, ConfigError | DataError) else f"{file}: {error}"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node, as files may be missing on one of them
            print(f"error: {told}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _agreed(read):
    """read(), or the end of every rank with exit status 2 where it fails on any, so that none
    waits for the others.
    """
    result = end = None
    try:
        result = _or_exit(read, "--commute")
    except SystemExit as fault:
        end = fault
    if reduce.any_rank(end is not None, reduce.everyone()):
        raise end or SystemExit(2)
    return result
