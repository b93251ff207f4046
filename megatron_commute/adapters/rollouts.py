"""Training loops that can be sent on an excursion and put back bit for bit: plain torch, and a DeepSpeed engine.

The copies lie in the memory of the host computer: as much as the model and its optimiser hold.
"""

import random

import numpy as np
import torch


class Loop:
    """response.Host of a plain torch loop.

    module: nn.Module; optimizer: torch optimiser; train: (step, domains i64[n], positions i64[n]) -> None, one step
    as the loop itself would make it; others: further objects with state_dict and load_state_dict (schedulers,
    scalers).
    """

    def __init__(self, module, optimizer, train, others=()):
        self.module, self.optimizer, self.train, self.others = module, optimizer, train, tuple(others)

    def save(self):
        return {
            "tensors": [(tensor, copied(tensor)) for tensor in self.tensors()],
            "slopes": [(p, None if p.grad is None else copied(p.grad)) for p in self.module.parameters()],
            "flags": [(m, m.training) for m in self.module.modules()],
            "optimizer": optimizer_state(self.optimizer),
            "others": [(other, deep(other.state_dict())) for other in self.others],
            "random": random_state(),
        }

    def restore(self, saved):
        with torch.no_grad():
            for tensor, copy in saved["tensors"]:
                tensor.copy_(copy)
        for p, slope in saved["slopes"]:
            if slope is None or p.grad is None:
                p.grad = None if slope is None else slope.to(p.device, copy=True)
            else:
                p.grad.copy_(slope)
        for module, training in saved["flags"]:
            module.training = training
        put_optimizer(self.optimizer, saved["optimizer"])
        for other, state in saved["others"]:
            other.load_state_dict(deep(state))
        put_random(saved["random"])

    def tensors(self):
        """What a step changes in place: parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]


class Engine(Loop):
    """response.Host of a DeepSpeed engine with ZeRO stage 0 to 2: also the flat float32 partitions of the optimiser,
    and the counters of engine and optimiser. Raises ValueError for ZeRO stage 3, whose parameters are partitioned.
    """

    def __init__(self, engine, train):
        if engine.zero_optimization_stage() > 2:
            raise ValueError("rollouts read whole parameters: set zero_optimization.stage to 0, 1 or 2")
        self.engine = engine
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        super().__init__(engine.module, inner, train, [s for s in (engine.lr_scheduler,) if s is not None])

    def tensors(self):
        from megatron_commute.adapters import megatron_core

        flat = [partition for _, partition in megatron_core._partitions(self.engine) if partition is not None]
        return [*super().tensors(), *flat]

    def save(self):
        return super().save() | {"counters": [(one, counters(one)) for one in self._counting()]}

    def restore(self, saved):
        super().restore(saved)
        for one, values in saved["counters"]:
            for name, value in values.items():
                setattr(one, name, value)

    def _counting(self):
        wrapper = self.engine.optimizer
        scaler = getattr(wrapper, "loss_scaler", None)
        return [one for one in (self.engine, wrapper, scaler) if hasattr(one, "__dict__")]


def counters(one):
    """Plain numbers and flags among an object's attributes."""
    return {name: value for name, value in vars(one).items() if isinstance(value, bool | int | float)}


def copied(tensor):
    """A copy in the memory of the host computer."""
    return tensor.detach().to("cpu", copy=True)


def deep(state):
    """A copy of nested dicts and lists with tensors in them."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: deep(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(deep(value) for value in state)
    return state


def optimizer_state(optimizer):
    """(state of each parameter, settings of each group) of a torch optimiser, tensors copied, keyed by the tensors in
    use.
    """
    state = {
        key: {
            name: (value, copied(value)) if torch.is_tensor(value) else value for name, value in slots.items()
        }
        for key, slots in optimizer.state.items()
    }
    settings = [{k: deep(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return state, settings


def put_optimizer(optimizer, saved):
    """Undo what steps did to a torch optimiser; state that did not exist is taken away again."""
    state, settings = saved
    for key in [key for key in optimizer.state if key not in state]:
        del optimizer.state[key]
    for key, slots in state.items():
        kept = {}
        for name, value in slots.items():
            kept[name] = value
            if isinstance(value, tuple) and len(value) == 2 and torch.is_tensor(value[0]):
                kept[name] = value[0]
                with torch.no_grad():
                    value[0].copy_(value[1])
        optimizer.state[key] = kept
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(deep(values))


def random_state():
    """Of torch on the CPU and all GPUs, numpy and python."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def put_random(state):
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def micro_batches(dataset, domains, positions, micro_batch):
    """The batches that a DataLoader over sampler.MixedDataset would bring for this rank's samples, an iterator of
    dicts.
    """
    for first in range(0, len(domains), micro_batch):
        chosen = range(first, min(first + micro_batch, len(domains)))
        items = [dataset[int(domains[i]), int(positions[i])] for i in chosen]
        yield torch.utils.data.default_collate(items)
