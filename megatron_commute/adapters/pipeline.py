"""Pipelines of DeepSpeed: gradients by the engine's own schedule, without the engine.

DeepSpeed's TrainSchedule is a list of instructions. Here they are carried out on tensors of the
probe's own: each stage runs through functional_call at displaced parameters, activations and their
gradients travel through megatron_commute.reduce, and what would reduce gradients or step the
optimiser is left out. The engine's buffers, counters, gradients, loss scale and data iterator take
no part, so nothing of them has to be put back. Only method difference works: there is no double
backward across stages.
"""

import contextlib

import torch

from megatron_commute import reduce
from megatron_commute.adapters import shards, torch_loop
from megatron_commute.adapters.metric import adam_metric
from megatron_commute.measure.model import Model, full_precision, low_precision

WORK = {
    "LoadMicroBatch": "load",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "SendActivation": "send_forward",
    "RecvActivation": "receive_forward",
    "SendGrad": "send_back",
    "RecvGrad": "receive_back",
}
IGNORED = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")  # training's own


def groups(engine):
    """reduce.Groups of a PipelineEngine; a group of one rank is None."""
    here = (engine.grid.get_data_parallel_group(), engine.grid.get_model_parallel_group())
    data, model = (group if reduce.size(group) > 1 else None for group in here)
    return reduce.Groups(data=data, model=model, world=reduce.everyone())


def probe_model(
    engine, batch, micro_batch, *, second_moments=None, owned=None, decayed=None, groups_=None, quiet=None
):
    """The Model of this rank's stage of a DeepSpeed PipelineEngine.

    batch: tokens i64[b, n] -> (inputs, labels), what the engine's batch function makes of a batch:
    inputs of the first layer (one tensor or a tuple), labels of the module's loss_fn, both on this
    rank's device. micro_batch: sequences a forward pass. second_moments, owned, decayed: as in
    torch_loop.probe_model, of this stage's trainable parameters; owned: what tensor parallelism
    says, tied weights are counted once by themselves. groups_: default groups(engine). quiet: () ->
    context manager around the work, beside dropout off (modules that must run in float32, layers
    that checkpoint activations, which cannot be probed).

    Raises ValueError without a loss function, for layers with additional losses and for an unknown
    schedule.
    """
    module, here = engine.module, groups_ or groups(engine)
    _refuse(engine)
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    names, params = [f"module.{name}" for name, _ in named], [p for _, p in named]
    tied, stage, peers = _tied(module, params), _Stage(module), engine.grid.get_slice_parallel_group()
    counted = owned or [True] * len(params)
    once = tuple(o and not p.ds_pipe_replicated for o, p in zip(counted, params, strict=True))

    def run(leaves, batches, **work):
        made = {"engine": engine, "leaves": leaves, "batch": batch, "batches": list(batches)}
        return _gradient(_Run(**made, **work), leaves, tied, here)

    def gradient(at, batches):
        leaves = [p.detach().requires_grad_(True) for p in at]
        moved = dict(zip(names, leaves, strict=True))

        def forward(*given):
            return torch.func.functional_call(stage, moved, given)

        return run(leaves, batches, forward=forward, peers=(peers,))

    def in_shards(groups):
        return shards.of(
            params, once, second_moments, groups, lambda cuts: _in_shards(cuts, groups, stage, run, peers)
        )

    def metric(name):
        return None if name == "identity" else adam_metric(second_moments, once, here.model)

    return Model(
        parameters=lambda: full_precision(params),
        loss=None,
        owned=once,
        decayed=tuple(decayed or [p.dim() > 1 for p in params]),
        metric=metric,
        quiet=lambda method: _silent(module, quiet),
        micro_batch=micro_batch,
        low_precision=low_precision(params),
        gradient=gradient,
        shards=in_shards,
    )


def _in_shards(cuts, groups, stage, run, peers):
    """The gradient of Shards: the replicas of a stage gather and scatter together, so they fail
    together.
    """

    def gradient(at, batches):
        whole = shards.Whole(cuts=cuts, at=at, group=groups.data, voters=groups.data)

        @contextlib.contextmanager
        def around():
            with whole.closing(), whole.instead_of_shards(stage):
                yield

        return run(whole.leaves, batches, forward=stage, around=around, peers=(peers, groups.data))

    return gradient


@contextlib.contextmanager
def _silent(module, quiet):
    with torch_loop.quiet(module), quiet() if quiet is not None else contextlib.nullcontext():
        yield


def _gradient(run, leaves, tied, here):
    """Gradients at `leaves` of a _Run that is not executed yet; those of `tied` weights are summed
    over their stages.
    """
    run.execute()
    with reduce.agreed(here.model):
        if run.fault is not None:
            raise run.fault
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    for i, group in tied:
        reduce.sum_of_vectors([gradients[i]], group)
    return gradients


def _tied(module, params):
    """(number of a parameter, group of the ranks that hold it too) of every tied weight."""
    numbers = {id(p): i for i, p in enumerate(params)}
    return [(numbers[id(w)], group) for w, group in module.get_tied_weights_and_groups() if id(w) in numbers]


def _refuse(engine):
    module = engine.module
    if module.loss_fn is None:
        raise ValueError("the PipelineModule has no loss_fn: give it one, as training needs it too")
    if module.get_additional_losses() is not None:
        raise ValueError("layers with additional losses (mixtures of experts) cannot be probed in a pipeline")
    unknown = {type(c).__name__ for step in _schedule(engine, 2) for c in step} - {*WORK, *IGNORED}
    if unknown:
        raise ValueError(
            f"this DeepSpeed's schedule has instructions unknown here: {', '.join(sorted(unknown))}"
        )


def _schedule(engine, micro_batches):
    from deepspeed.runtime.pipe.schedule import TrainSchedule

    return TrainSchedule(micro_batches=micro_batches, stages=engine.num_stages, stage_id=engine.stage_id)


class _Stage(torch.nn.Module):
    """This stage's layers one after the other, without the checkpointing and seeding of
    PipelineModule.forward, and the loss where labels are given; as one module, so that
    functional_call swaps parameters around all of it.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs, labels):
        for layer in self.module.forward_funcs:
            inputs = layer(inputs)
        return inputs if labels is None else self.module.loss_fn(inputs, labels)


class _Slot:
    """A micro-batch in flight on this stage."""

    def __init__(self):
        self.number, self.labels, self.slopes = 0, None, None
        self.inputs, self.single = [], True  # single: a bare tensor, not a tuple
        self.outputs, self.single_out = [], True


class _Run:
    """One pass of forward and backward over all micro-batches of one gradient, which collects in
    the leaves' .grad.

    A stage that has met a fault goes on sending, but words of the fault in place of tensors, so
    that every stage comes to the end of the schedule and none waits.
    """

    def __init__(self, *, engine, leaves, batch, batches, forward, peers, around=contextlib.nullcontext):
        self.engine, self.leaves, self.batch, self.batches = engine, leaves, batch, batches
        self.stage, self.around = forward, around
        self.peers, self.fault, self.slots, self.pending = peers, None, {}, []
        self.loaded = self.begun = 0
        self.device = leaves[0].device
        stages, here = engine.num_stages, engine.stage_id
        self.last = here == stages - 1
        at = engine.grid.stage_to_global
        self.before, self.after = at(here - 1) if here else None, None if self.last else at(here + 1)

    def execute(self):
        for step in _schedule(self.engine, len(self.batches)):
            for command in step:
                work = WORK.get(type(command).__name__)
                if work is not None:
                    getattr(self, work)(self.slots.setdefault(command.buffer_id, _Slot()))
        reduce.wait(self.pending)

    @contextlib.contextmanager
    def _guarded(self):
        try:
            yield
        except Exception as fault:
            self.fault = self.fault or fault

    def _may_compute(self):
        """Ranks that share this stage, and its replicas where they share shards, compute together
        or not at all: their layers wait for each other.
        """
        for group in self.peers:
            if reduce.any_rank(self.fault is not None, group) and self.fault is None:
                self.fault = RuntimeError("another rank of this pipeline stage failed")
        return self.fault is None

    def load(self, slot):
        with self._guarded():
            inputs, slot.labels = self.batch(self.batches[self.loaded][0])
            if self.before is None:
                slot.single = torch.is_tensor(inputs)
                slot.inputs = [inputs] if slot.single else list(inputs)
            if not self.last:
                slot.labels = None
        self.loaded += 1

    def forward(self, slot):
        slot.number, self.begun = self.begun, self.begun + 1
        if not self._may_compute():
            return
        with self._guarded(), self.around(), torch.enable_grad():
            inputs = slot.inputs[0] if slot.single else tuple(slot.inputs)
            made = self.stage(inputs, slot.labels)
            if self.last:
                made = made * self.batches[slot.number][1]
            slot.outputs = [made] if torch.is_tensor(made) else list(made)
            slot.single_out = torch.is_tensor(made)

    def backward(self, slot):
        if not self._may_compute():
            return
        with self._guarded(), self.around():
            outputs = [t for t in slot.outputs if t.requires_grad]
            inputs = [*self.leaves, *(t for t in slot.inputs if t.requires_grad)]
            if outputs:
                torch.autograd.backward(outputs, None if self.last else slot.slopes, inputs=inputs)
            slot.outputs = slot.slopes = None

    def _send(self, tensors, number, peer):
        self.pending = [(work, part) for work, part in self.pending if not work.is_completed()]
        with self._guarded():
            if self.fault is None:
                self.pending += reduce.send(tensors, number, peer)
                return
        self.pending += reduce.send(None, number, peer)

    def _receive(self, number, peer):
        got, tensors = reduce.receive(peer, self.device)
        with self._guarded():
            if tensors is None:
                raise RuntimeError("another pipeline stage failed")
            if got != number:
                raise RuntimeError(
                    f"pipeline stages are out of order: message {number} was due from rank {peer}, {got} came"
                )
        return tensors

    def send_forward(self, slot):
        single = torch.tensor(slot.single_out, device=self.device)
        self._send([single, *slot.outputs], 2 * slot.number, self.after)

    def receive_forward(self, slot):
        tensors = self._receive(2 * self.begun, self.before)
        if tensors:
            slot.single, slot.inputs = bool(tensors[0]), tensors[1:]

    def send_back(self, slot):
        sloped = [t for t in slot.inputs if t.requires_grad]
        slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in sloped]
        self._send(slopes, 2 * slot.number + 1, self.before)
        slot.inputs = []

    def receive_back(self, slot):
        slot.slopes = self._receive(2 * slot.number + 1, self.after)
