"""What a block of code makes other ranks or a device wait for: collectives, and reads of tensors by the host."""

import contextlib

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier",
               "reduce_scatter_tensor", "isend", "irecv", "send", "recv", "reduce", "gather", "scatter")  # fmt: skip
READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero",
         "is_nonzero", "equal")  # fmt: skip


class _Reads(TorchFunctionMode):
    def __init__(self, device_of_ours):
        super().__init__()
        self.found, self.device_of_ours = [], device_of_ours

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", str(function))
        if name in READS and self.device_of_ours(args[0]):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def collectives():
    """Names of the calls of torch.distributed inside, in order."""
    found, kept = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name):
        def call(*args, **named):
            found.append(name)
            return kept[name](*args, **named)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


@contextlib.contextmanager
def reads(device_of_ours=lambda tensor: True):
    """Names of the calls inside that make the host wait for a tensor. device_of_ours: which tensors a GPU would hold."""
    with _Reads(device_of_ours) as mode:
        yield mode.found
    assert torch.overrides._get_current_function_mode() is not mode
