"""Any PyTorch training loop: what a probe needs of an nn.Module and its optimiser.

Nothing of the module is written to: losses are evaluated through torch.func.functional_call on
tensors of the probe's own, so a probe that fails half-way leaves no trace.
"""

import contextlib
import dataclasses
import pathlib

import numpy as np
import torch

from megatron_commute import config as front_door
from megatron_commute import reduce
from megatron_commute.adapters import branch, shards
from megatron_commute.adapters.metric import adam_metric
from megatron_commute.data import blend, resume, takeover
from megatron_commute.data.indexed import domain_datasets, drawer, inspect_data
from megatron_commute.data.sampler import MixedDataset, MixtureSampler
from megatron_commute.data.stream import Stream
from megatron_commute.decide import flow_run, laws
from megatron_commute.hook import Hook
from megatron_commute.measure.model import Model, full_precision, low_precision
from megatron_commute.mixture import Mixture
from megatron_commute.record import log

# the backward pass comes after functional_call has put the module's own weights back
HOOKS_REFUSED = (
    "activation checkpointing, or another hook on saved tensors, would recompute with the module's own "
    "weights instead of the probe's: switch it off while module.training is False"
)


def probe_model(
    module,
    loss,
    micro_batch,
    second_moments=None,
    owned=None,
    decayed=None,
    groups=None,
    exact=None,
    verify=None,
):
    """Build the measure.model.Model of an nn.Module.

    loss: (module, tokens i64[b, n]) -> mean loss, calling module(...) as training does.
    micro_batch: sequences a forward pass. second_moments: () -> bias-corrected second moments of
    Adam (tensors, one per trainable parameter) or None. owned, decayed: per trainable
    parameter, see measure.model; default: all owned, decay on matrices only. groups:
    reduce.Groups. exact: () -> context manager that makes the module twice differentiable;
    default: nothing to do. Raises ValueError for a module without trainable parameters and for
    one in DistributedDataParallel. A module that checkpoints activations must not do so while
    module.training is False; one that does is refused at every probe.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: nothing to measure")
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        raise ValueError("a forward pass of DistributedDataParallel prepares a reduction: give its .module")
    names, params = [name for name, _ in named], [p for _, p in named]

    def at(values, tokens):
        swapped = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
        with torch.autograd.graph.disable_saved_tensors_hooks(HOOKS_REFUSED):
            return torch.func.functional_call(_Loss(module, loss), swapped, (tokens,))

    owned, groups = tuple(owned or [True] * len(named)), groups or reduce.Groups()

    def metric(name):
        return None if name == "identity" else adam_metric(second_moments, owned, groups.model)

    def in_shards(groups):
        return shards.of(
            params, owned, second_moments, groups, lambda cuts: shards.gradient(module, loss, cuts, groups)
        )

    def verified(values, tokens):
        verify(lambda point: at(point, tokens), values, lambda v: squared_length(v, owned, groups))

    return Model(
        parameters=lambda: full_precision(params),
        loss=at,
        owned=owned,
        decayed=tuple(decayed or [p.dim() > 1 for p in params]),
        metric=metric,
        quiet=lambda method: quiet(module, exact if method == "exact" else None),
        micro_batch=micro_batch,
        verify=_once(verified) if verify is not None else None,
        low_precision=low_precision(params),
        shards=in_shards,
    )


def _once(check):
    """`check` until it has passed; then nothing."""
    passed = []

    def checked(*arguments):
        if not passed:
            check(*arguments)
            passed.append(True)

    return checked


class _Loss(torch.nn.Module):
    """A module and its loss as one callable, so that functional_call swaps parameters around
    both.
    """

    def __init__(self, module, loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, tokens):
        return self.loss(self.module, tokens)


def squared_length(vector, owned, groups):
    """|vector|^2 over all parameters of the model, each counted once; a float."""
    here = sum(float(v.double().square().sum()) for v, counts in zip(vector, owned, strict=True) if counts)
    return float(reduce.sum_of_numbers(np.array([here]), groups.model)[0])


@contextlib.contextmanager
def quiet(module, exact=None):
    """Dropout off and random state kept for the time of a probe; every module's own training
    flag is put back.
    """
    flags = [(m, m.training) for m in module.modules()]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        for m, _ in flags:
            m.training = False
        with exact() if exact is not None else contextlib.nullcontext():
            yield
    finally:
        for m, training in flags:
            m.training = training
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def second_moments(optimizer, parameters):
    """Bias-corrected second moments of torch.optim.Adam or AdamW, one per parameter and made one
    by one, or None before its first step.
    """
    betas = {
        id(p): group["betas"][1]
        for group in optimizer.param_groups
        for p in group["params"]
        if "betas" in group
    }
    kept = [(p, optimizer.state.get(p, {})) for p in parameters]
    if any("exp_avg_sq" not in state or id(p) not in betas for p, state in kept):
        return None
    return (state["exp_avg_sq"] / (1 - betas[id(p)] ** float(state["step"])) for p, state in kept)


class Plugin:
    """The plug-in in one training run: mixture file and data checked at once, attached when the
    model stands.

    file: the mixture file; run: config.Run; host_blend: words of the host's own data `flag`, which
    mode shadow must agree with. Raises ConfigError, before anything is written, where they do not
    fit.
    """

    def __init__(self, file, run, host_blend=(), flag="--train-data-path"):
        self.run = run
        self.config = front_door.load(file)
        counted = inspect_data(self.config, run.seq_length)
        self.plan = front_door.resolve(self.config, run, *counted)
        laws.check(self.config)
        self.feeds = self.config.mode != "shadow"
        self.host_blend = tuple(host_blend)
        if not self.feeds and host_blend:
            blend.check(self.config, self.plan, host_blend, flag)
        self.hook = self.sampler = self.dataset = self.flow = None

    def mixture(self):
        """The stream of a fresh run. In mode shadow it follows the host's own rule, which knows
        no budgets.
        """
        plan = self.plan
        if not self.feeds:
            return Mixture(plan.weights)
        bounds = {"samples": plan.samples, "minimum": plan.minimum, "maximum": plan.maximum}
        stream = Mixture(plan.weights, plan.budgets, **bounds)
        for at_sample, weights in plan.schedule:
            stream.schedule(weights, at_sample)
        return stream

    def attach(
        self,
        model,
        groups,
        run_dir,
        learning_rate,
        decay,
        *,
        vocab_size=None,
        state=None,
        consumed=0,
        accept=False,
        take_over=False,
        origin=None,
        listeners=(),
        say=print,
    ):
        """Build hook and, in the modes that feed training, dataset and sampler; start or rewind
        the record.

        model: probe.Model; groups: reduce.Groups; run_dir: folder of the record; learning_rate:
        step -> rate; state: of Hook.state_dict, from a checkpoint after `consumed` samples, or
        None; accept, take_over: see data.resume; origin: folder of that checkpoint where it may
        not be run_dir; listeners: of hook.Hook, those of this rank. Raises ConfigError where the
        state does not fit the mixture file.
        """
        mixture, ledger, news = self._resumed(learning_rate, groups, state, consumed, accept, take_over)
        if self.feeds:
            self._feed(mixture.copy(), ledger.keys, groups)
        self.hook = Hook(
            config=self.config,
            plan=self.plan,
            run=self.run,
            stream=Stream(consumed=mixture, sampler=self.sampler, groups=groups, batches=self.run.batches),
            ledger=ledger,
            model=model,
            groups=groups,
            draw=drawer(self.config, self.plan, self.run.seq_length, vocab_size),
            record=log.Record(pathlib.Path(run_dir) / log.NAME),
            learning_rate=learning_rate,
            decay=decay,
            say=say,
            listeners=listeners,
            flow=self.flow,
        )
        # what is refused is refused before a new record takes the place of the old one
        told = branch.sentence(self.hook.record.path, origin, state, groups)
        if state is not None:
            self.hook.load_state_dict(state, rewind=not news, branch=told)
        if state is None or news:
            self.hook.start([*news, told] if told else news)
        return self.hook

    def _feed(self, mixture, keys, groups):
        """Dataset and sampler of this rank."""
        training, _ = domain_datasets(self.config, self.plan, self.run.seq_length)
        self.dataset = MixedDataset(training, self.config.seed, keys)
        self.sampler = MixtureSampler(
            mixture=mixture,
            micro_batch=self.run.micro_batch,
            data_parallel_rank=reduce.rank_in(groups.data),
            data_parallel_size=reduce.size(groups.data),
            global_batch=self.run.global_batch,
            stop_sample=self.plan.samples,
        )

    def _resumed(self, learning_rate, groups, state, consumed, accept, take_over):
        """The data.resume.Resumed of this run, on the weights that law flow plans where it is
        followed.
        """
        stock = None
        if take_over and self.host_blend:
            stock = takeover.stock_weights(blend.read(self.host_blend)[1])
        rates = None
        if flow_run.follows(self.config):
            rates = flow_run.rates_of(self.config, learning_rate, self.run.train_iters)
        kept = state.get("flow") if state is not None else None
        also = [] if state is None else flow_run.differences(kept, self.config, self.plan, rates)
        resumed = resume.resumed(
            self.config,
            self.plan,
            self.mixture(),
            state,
            consumed,
            stock,
            accept=accept,
            attach=take_over,
            also=also,
        )
        mixture, news = resumed.mixture, resumed.news
        if rates is not None:
            self._follow(mixture, rates, groups, state, news)
        elif news and kept is not None and not self.plan.schedule:
            mixture.schedule(laws.left_evenly(mixture, self.plan.weights), mixture.index)
        return resumed

    def _follow(self, mixture, rates, groups, state, news):
        """Plan the rest of the run by law flow, as the checkpoint's state did or, with news, from
        where the mixture stands. In mode act the decisions of the run make it again.
        """
        asked = {"config": self.config, "plan": self.plan, "run": self.run, "rates": rates}
        self.flow = found = flow_run.planned(**asked, mixture=mixture, state=state, anew=bool(news))
        notes, acts = found.schedule.notes, self.config.mode == "act"
        if acts and news and state is not None:
            mixture.schedule(flow_run.continued(state, self.plan), mixture.index)
        if not acts:
            weights = found.schedule.weights
            weights = reduce.broadcast_numbers(weights.ravel(), groups).reshape(weights.shape)
            self.flow = flow_run.with_weights(found, weights, self.run.batches)
        schedule = () if acts else self.flow.schedule.changes
        self.plan = dataclasses.replace(self.plan, schedule=schedule, warnings=(*self.plan.warnings, *notes))
        for at_sample, weights in schedule if news or not (state or {}).get("flow") else ():
            mixture.schedule(weights, at_sample)

    def summary(self, run_dir):
        """Write the report and return its closing table, or why there is none: training is over
        and nothing here spoils its exit status.
        """
        from megatron_commute.report import plots

        try:
            return plots.closing(run_dir)
        except Exception as fault:
            why = str(fault).partition("\n")[0] or type(fault).__name__
            return f"the report was not written: {why}; later: megatron-commute report {run_dir}"
