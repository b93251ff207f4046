"""Files of several checkpoints into one whose tensors are their means.

One tensor at a time is summed, in float64; files are mapped, so that the memory is that of one file
and of one tensor. Old torch files, which cannot be mapped, are all held at once.
"""

import torch

from megatron_commute.checkpoints.files import CheckpointError, load
from megatron_commute.checkpoints.rewriting import save

# float32 copies of the weights in optimiser states of DeepSpeed: ZeRO 0 to 2 and bf16, ZeRO 3, fp16
_MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups", "fp32_groups_flat", "fp32_groups")
# states of optimisers that begin as zeros
_FROM_ZERO = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def mean_file(kind, paths, target):
    """Write the mean of files of one kind; the number of tensors that are means."""
    if kind == "safetensors":
        return _mean_safetensors(paths, target)
    contents = [load(path) for path in paths]
    places = [_averaged(kind, content, path) for content, path in zip(contents, paths, strict=True)]
    for path, own in zip(paths, places, strict=True):
        _refuse_other_tensors(path, _shapes(own), paths[-1], _shapes(places[-1]))
    done, means = 0, {}
    for name, (holder, key) in places[-1].items():
        tensors = [own[name][0][own[name][1]] for own in places]
        own = tensors[-1]
        if not own.is_floating_point() or not own.numel():
            continue
        # tied weights stay one storage
        same = own.untyped_storage().data_ptr(), own.storage_offset(), own.shape, own.stride()
        if same not in means:
            means[same] = own, _mean(tensors, name, paths)  # `own` is kept, or its address could come again
        holder[key], done = means[same][1], done + 1
    optimizer = _optimizer(kind, contents[-1])
    if optimizer is not None:
        make_fresh(optimizer, paths[-1])
    save(contents[-1], target)
    return done


def _mean_safetensors(paths, target):
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError(
            f"{paths[-1]}: is read with a package that is not installed: pip install safetensors"
        ) from None
    try:
        opened = [safe_open(path, "pt") for path in paths]
        told = [_told(file) for file in opened]
        for path, own in zip(paths, told, strict=True):
            _refuse_other_tensors(path, own, paths[-1], told[-1])
        found, done = {}, 0
        for name in told[-1]:
            own = opened[-1].get_tensor(name)
            if own.is_floating_point():
                own, done = _mean([file.get_tensor(name) for file in opened], name, paths), done + 1
            found[name] = own
        save_file(found, target, metadata=opened[-1].metadata())
    except (SafetensorError, OSError) as fault:
        raise CheckpointError(f"{paths[-1]} and those before it: {fault}; copy them again") from None
    return done


def _told(file):
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    return {name: (tuple(own.get_shape()), own.get_dtype()) for name, own in slices.items()}


@torch.no_grad()
def _mean(tensors, name, paths):
    """The mean of tensors of one shape and type; CheckpointError where one is not finite."""
    total = torch.zeros(tensors[-1].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor.to(torch.float64)
    if not torch.isfinite(total).all():
        for path, tensor in zip(paths, tensors, strict=True):
            if not torch.isfinite(tensor.to(torch.float64)).all():
                raise CheckpointError(f"{path}: {name} is not finite; the run had diverged, leave it out")
    # masters are saved as what wants gradients, and stay so
    return (total / len(tensors)).to(tensors[-1].dtype).requires_grad_(tensors[-1].requires_grad)


def _shapes(places):
    tensors = {name: holder[key] for name, (holder, key) in places.items()}
    # integers are copied, and some of them are bytes of any length
    return {
        name: (tuple(tensor.shape) if tensor.is_floating_point() else "of any shape", tensor.dtype)
        for name, tensor in tensors.items()
    }


def _refuse_other_tensors(path, own, last, of_last):
    """own, of_last: {name: (shape, type)}."""
    for name in sorted(own.keys() | of_last.keys()):
        if own.get(name) != of_last.get(name):
            one, other = (str(told.get(name, "none")) for told in (own, of_last))
            raise CheckpointError(
                f"{path}: {name} is {one}, in {last} {other}; average checkpoints of one model and precision"
            )


def _optimizer(kind, content):
    """The optimiser's part of a file, or None."""
    if kind == "optimizer":
        return content.get("optimizer_state_dict")
    return content.get("optimizer") if kind == "model" else None


def _averaged(kind, content, path):
    """{name: (its container, key there)} of the tensors of a file whose mean is taken."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no tensors by name; it is no checkpoint, or it is damaged")
    weights = {"model": content.get("module"), "optimizer": None}.get(kind, content)
    copies = {name: place for name, place in _tensors(_optimizer(kind, content), path) if _is_master(name)}
    return dict(_tensors(weights, path)) | copies


def _is_master(name):
    return not {*_MASTERS}.isdisjoint(name.split("/"))


def _tensors(node, path, within=""):
    """(name, (container, key)) of every tensor below a dict or list."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        name = f"{within}/{key}" if within else str(key)
        if torch.is_tensor(value):
            yield name, (node, key)
        elif isinstance(value, tuple) and any(torch.is_tensor(part) for part in value):
            raise CheckpointError(
                f"{path}: {name} is a tuple of tensors, which is not known here; leave it out"
            )
        else:
            yield from _tensors(value, path, name)


def make_fresh(optimizer, path):
    """Set an optimiser's states, but not its copies of the weights, to what they are before the
    first step.
    """
    for name, (holder, key) in _tensors(optimizer, path):
        if key in _FROM_ZERO:
            holder[key] = torch.zeros_like(holder[key])
        elif holder[key].numel() > 1 and not _is_master(name):
            raise CheckpointError(
                f"{path}: holds {name} of an optimiser whose beginning is not known here (Adam's "
                "and momentum are); average checkpoints without optimiser states"
            )
    _zero_counters(optimizer)


def _zero_counters(node):
    """Steps that are plain numbers, in states and in groups."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _zero_counters(value)
    if isinstance(node, dict) and isinstance(node.get("step"), int | float):
        node["step"] = 0
