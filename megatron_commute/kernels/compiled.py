"""The compiled kernels as operators torch.ops.megatron_commute.*; arguments are checked in ops.py,
their only caller.

Each operator has a schema, a fake kernel, and an implementation that calls csrc where it was
compiled for the device and the dtype, else the namesake in reference.py. Where the latter gives
None, operators give an empty tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_commute.kernels import reference
from megatron_commute.kernels.reference import ACTIVATIONS, NORMS

try:
    from megatron_commute.kernels import _cpu
except ImportError:  # not built: the references take over
    _cpu = None

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_GRAM_BLOCKS = 256  # as GRAM_BLOCKS in csrc/gram.cuh
_KERNELS = {}
_KINDS = {kind: code for kinds in (NORMS, ACTIVATIONS) for code, kind in enumerate(kinds)}
_enabled = os.environ.get("MEGATRON_COMMUTE_KERNELS", "on") != "off"


def _cuda_library():
    """The launchers of csrc/launch.cu; None where they were not built or no GPU is there."""
    files = sorted(Path(__file__).parent.glob("_cuda*.so"))
    return ctypes.CDLL(str(files[0])) if files and torch.cuda.is_available() else None


_cuda = _cuda_library()


@contextlib.contextmanager
def references():
    """Within this block every function takes its plain-torch reference."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def compiled(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether calls on this device and dtype go to compiled kernels now."""
    kind = torch.device(device).type
    if not _enabled or dtype not in _CODES:
        return False
    return (kind == "cpu" and _cpu is not None) or (
        kind == "cuda" and _cuda is not None and dtype is not torch.float64
    )


def wide(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


class _Kernel(NamedTuple):
    """What a kernel needs besides the arguments, each a function of them.

    outputs: new tensors, which the fake kernel returns as well; sizes: the 64-bit sizes; scratch:
    bytes of memory to work in, on CUDA alone. A kernel takes the dtype's code, the tensors among
    the arguments, the outputs, (the scratch,) the sizes, the numbers among the arguments, and the
    number of threads (the stream).
    """

    outputs: Callable
    sizes: Callable
    scratch: Callable = lambda *args: 0

    def prepare(self, args):
        """New outputs, and the numbers and pointers that the kernel takes."""
        results = _tuple(self.outputs(*args))
        tensors = [t for t in args if t is None or isinstance(t, torch.Tensor)]
        rest = [_KINDS.get(t, t) for t in args if t is not None and not isinstance(t, torch.Tensor)]
        pointers = [0 if t is None else t.data_ptr() for t in (*tensors, *results)]
        return results, [_CODES[args[0].dtype], *self.sizes(*args), *rest], pointers


def _call(library, name, numbers, pointers, stream):
    """Call a launcher of csrc/launch.cu; the last pointer is the scratch memory."""
    typed = [ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) for x in numbers]
    addresses = [ctypes.c_void_p(p) for p in pointers]
    status = getattr(library, name)(typed[0], *addresses, *typed[1:], ctypes.c_void_p(stream))
    if status != 0:
        raise RuntimeError(f"{name} could not be launched: CUDA error {status}")


def _launch(name, device, numbers, pointers, scratch_bytes):
    if device.type == "cpu":
        return getattr(_cpu, name)(numbers[0], *pointers, *numbers[1:], torch.get_num_threads())
    with torch.cuda.device(device):
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _call(_cuda, name, numbers, [*pointers, scratch.data_ptr()], stream)


def _operator(name, schema, *layout):
    """Register torch.ops.megatron_commute.<name>; layout: the fields of _Kernel."""
    kernel = _KERNELS[name] = _Kernel(*layout)

    def implementation(*args):
        x = args[0]
        if not _has(name, x):
            found = getattr(reference, name)(*args)
            return _one_or_all([x.new_empty(0, dtype=wide(x)) if t is None else t for t in _tuple(found)])
        results, numbers, pointers = kernel.prepare(args)
        if x.numel():
            _launch(name, x.device, numbers, pointers, kernel.scratch(*args))
        else:
            for t in results:
                t.zero_()
        return _one_or_all(results)

    operator = torch.library.custom_op(
        f"megatron_commute::{name}", implementation, mutates_args=(), schema=schema
    )
    operator.register_fake(kernel.outputs)
    return operator


def _has(name, x):
    """Whether a kernel takes these arguments: attention has none in float64, on CUDA none beyond
    128 columns.
    """
    attention = name.startswith("attention")
    if attention and (x.dtype is torch.float64 or (x.device.type == "cuda" and x.shape[-1] > 128)):
        return False
    return compiled(x.device, x.dtype)


def _tuple(found):
    return found if isinstance(found, tuple) else (found,)


def _one_or_all(results):
    return results[0] if len(results) == 1 else tuple(results)


# Outputs, which the fake kernels return as well, and sizes of each operator.


def _norm_forward_outputs(x, dx, weight, dweight, bias, dbias, eps, kind):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[0], 4, dtype=wide(x))


def _norm_backward_outputs(gy, dgy, x, dx, saved, weight, dweight, kind):
    h = x.shape[1]
    sums = [x.new_empty(h if kind == "layer" or i < 2 else 0, dtype=wide(x)) for i in range(4)]
    return torch.empty_like(x), torch.empty_like(x), *sums


def _activation_forward_outputs(x, dx, bias, dbias, kind):
    f = x.shape[1] // 2 if kind == "swiglu" else x.shape[1]
    return x.new_empty(x.shape[0], f), x.new_empty(x.shape[0], f)


def _activation_backward_outputs(gy, dgy, x, dx, bias, dbias, kind):
    sums = [x.new_empty(0 if bias is None else x.shape[1], dtype=wide(x)) for _ in range(2)]
    return torch.empty_like(x), torch.empty_like(x), *sums


def _statistics_outputs(logits, dlogits, labels, first):
    return logits.new_empty(logits.shape[0], 5, dtype=wide(logits))


def _two_like_first(first, *others):
    return torch.empty_like(first), torch.empty_like(first)


def _attention_forward_outputs(q, dq, k, dk, v, dv, scale):
    return torch.empty_like(q), torch.empty_like(q), q.new_empty(*q.shape[:3], 2, dtype=wide(q))


def _attention_backward_outputs(go, dgo, q, dq, k, dk, v, dv, o, do, saved, scale):
    return tuple(torch.empty_like(t) for t in (q, q, k, k, v, v))


def _attention_sizes(q, k):
    b, a, s, c = q.shape
    return b, a, k.shape[1], s, c


_PIECES = 64  # partial sums by column on CUDA, as COLUMN_PIECES in csrc/launch.cu
norm_forward = _operator(
    "norm_forward",
    "(Tensor x, Tensor dx, Tensor weight, Tensor dweight, Tensor? bias, Tensor? dbias, float eps, str kind)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_forward_outputs,
    lambda x, *_: x.shape,
)
norm_backward = _operator(
    "norm_backward",
    "(Tensor gy, Tensor dgy, Tensor x, Tensor dx, Tensor saved, Tensor weight, Tensor dweight, str kind)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_backward_outputs,
    lambda gy, *_: gy.shape,
    lambda gy, *_: _PIECES * 4 * gy.shape[1] * 4,
)
activation_forward = _operator(
    "activation_forward",
    "(Tensor x, Tensor dx, Tensor? bias, Tensor? dbias, str kind) -> (Tensor, Tensor)",
    _activation_forward_outputs,
    lambda x, dx, bias, dbias, kind: (x.shape[0], x.shape[1] // 2 if kind == "swiglu" else x.shape[1]),
)
activation_backward = _operator(
    "activation_backward",
    "(Tensor gy, Tensor dgy, Tensor x, Tensor dx, Tensor? bias, Tensor? dbias, str kind)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _activation_backward_outputs,
    lambda gy, *_: gy.shape,
    lambda gy, dgy, x, *_: _PIECES * 2 * x.shape[1] * 4,
)
cross_entropy_statistics = _operator(
    "cross_entropy_statistics",
    "(Tensor logits, Tensor dlogits, Tensor labels, int first) -> Tensor",
    _statistics_outputs,
    lambda logits, *_: logits.shape,
)
cross_entropy_backward = _operator(
    "cross_entropy_backward",
    "(Tensor logits, Tensor dlogits, Tensor labels, int first, Tensor statistics, float scale)"
    " -> (Tensor, Tensor)",
    _two_like_first,
    lambda logits, *_: logits.shape,
)
attention_forward = _operator(
    "attention_forward",
    "(Tensor q, Tensor dq, Tensor k, Tensor dk, Tensor v, Tensor dv, float scale) -> (Tensor, Tensor, "
    "Tensor)",
    _attention_forward_outputs,
    lambda q, dq, k, *_: _attention_sizes(q, k),
)
attention_backward = _operator(
    "attention_backward",
    "(Tensor go, Tensor dgo, Tensor q, Tensor dq, Tensor k, Tensor dk, Tensor v, Tensor dv, Tensor o, "
    "Tensor do, Tensor saved, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attention_backward_outputs,
    lambda go, dgo, q, dq, k, *_: _attention_sizes(q, k),
    lambda go, *_: 8 * go.shape[:3].numel(),
)


# Vectors of model size: lists of tensors come flattened, vector after vector.


def _gram(tensors, K, M, metric, eps, same):
    device = tensors[0].device
    per_vector = len(tensors) // (K + M + metric + (K if eps else 0))
    addresses = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
    dtypes = np.array([_CODES[t.dtype] for t in tensors], dtype=np.int32)
    sizes = np.array([t.numel() for t in tensors[:per_vector]], dtype=np.int64)
    out = torch.empty(K, M, dtype=torch.float64, device=device)
    tables = [table.ctypes.data for table in (addresses, dtypes, sizes)]
    if device.type == "cpu":
        ends = out.data_ptr(), torch.get_num_threads()
        _cpu.gram(*tables, per_vector, K, M, int(metric), eps, int(same), *ends)
        return out
    with torch.cuda.device(device):
        scratch = torch.empty(_GRAM_BLOCKS, K, M, dtype=torch.float64, device=device)
        pointers = [ctypes.c_void_p(p) for p in (*tables, out.data_ptr(), scratch.data_ptr())]
        numbers = [ctypes.c_int64(x) for x in (per_vector, K, M, int(metric))]
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        status = _cuda.gram(*pointers[:3], *numbers, ctypes.c_double(eps), *pointers[3:], stream)
    if status != 0:
        raise RuntimeError(f"gram could not be launched on {device}: CUDA error {status}")
    return out


gram = torch.library.custom_op(
    "megatron_commute::gram",
    _gram,
    mutates_args=(),
    schema="(Tensor[] tensors, int K, int M, bool metric, float eps, bool same) -> Tensor",
)


@gram.register_fake
def _(tensors, K, M, metric, eps, same):
    return tensors[0].new_empty(K, M, dtype=torch.float64)


def _displaced(params, v, metric, eps, realised):
    return torch.empty_like(params), params.new_empty(params.shape if realised else 0, dtype=wide(params))


def _displace(params, v, metric, eps, realised):
    moved, step = _displaced(params, v, metric, eps, realised)
    codes = [_CODES[t.dtype] for t in (params, v, params if metric is None else metric)]
    pointers = [0 if t is None else t.data_ptr() for t in (params, v, metric, moved, step)]
    _cpu.displace(*codes, *pointers, params.numel(), eps, torch.get_num_threads())
    return moved, step


displace = torch.library.custom_op(
    "megatron_commute::displace",
    _displace,
    mutates_args=(),
    schema="(Tensor params, Tensor v, Tensor? metric, float eps, bool realised) -> (Tensor, Tensor)",
)
displace.register_fake(_displaced)
