"""What one model-parallel rank holds, put together from the shards of ZeRO 0 to 3: parameters,
second moments, decay.

The layout of the shards is that of deepspeed (0.10 to 0.19): ZeRO 1 and 2 cut each optimiser group,
flattened, into equal ranges and say where each parameter's fragment lies (`param_slice_mappings`);
ZeRO 3 cuts every parameter into equal ranges, padded, one after the other. Without ZeRO the
optimiser is whole.
"""

import dataclasses
import math
import re

import torch

from megatron_commute.checkpoints.files import CheckpointError, load, reading

LOOK = 4096  # numbers of each fragment that are compared with the model states


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankState:
    """What one model-parallel rank holds, by parameter name."""

    parameters: dict
    # {name: tensor}
    moments: dict | None
    # second moments of Adam likewise, bias-corrected; None where the checkpoint has none
    decays: dict
    # {name: whether weight decay acts}
    state: dict
    # all else that its model states say
    coupled: bool = False
    # whether weight decay enters the gradient (torch.optim.Adam) instead of acting beside it


def layout(files, model_ranks):
    """What wrote checkpoints.files.Files of `model_ranks` model-parallel ranks, in words."""
    data = len({data for data, _ in files.optimizer})
    kind = "ZeRO 3" if files.shards else "ZeRO 1 or 2" if data else "no ZeRO"
    return f"{kind}, {data or 1} x {model_ranks} ranks"


def rank_state(files, rank, module=None):
    """The RankState of model-parallel rank `rank` of checkpoints.files.Files.

    module: {name: tensor} where its parameters lie in files of their own (pipelines). Raises
    CheckpointError.
    """
    own = {data: path for (data, model), path in files.optimizer.items() if model == rank}
    if files.shards:
        with reading(files.shards[0, rank]):
            return _of_stage_3(files, rank, own)
    path = files.model[rank]
    state = load(path)
    with reading(path):
        module = _plain(_expected(state, "module", path)) if module is None else module
        _require_shards(path, state, own)
    if own:
        shards = [(own[data], load(own[data])) for data in sorted(own)]
        moments, decays = _of_fragments(shards, state, module)
        inner = shards[0][1]["optimizer_state_dict"]["base_optimizer_state"]
    else:
        with reading(path):
            inner = state.get("optimizer") or {}
            moments, decays = _of_whole(inner, module, path)
            _refuse_other_step([(path, step) for step in steps_done(inner, path)], state, path)
    return RankState(
        parameters=module, moments=moments, decays=decays, state=state, coupled=coupled_decay(inner)
    )


def _require_shards(path, state, own):
    """Raises CheckpointError where an optimiser state is missing that the model states in `path`
    say was saved; the last ones too, without which the rest looks whole. None at all is no fault:
    weights alone can be measured.
    """
    for data in range(state.get("dp_world_size") or 0) if own else ():
        if data not in own:
            some = next(iter(own.values()))
            name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{data}", some.name)
            raise CheckpointError(
                f"{some.with_name(name)}: is missing, {state['dp_world_size']} data-parallel ranks saved "
                "this checkpoint; it is incomplete, copy the whole folder"
            )


def steps_done(inner, path):
    """Steps that an optimiser's state dict has done: one number for each of its states."""
    groups, states = _groups(inner, path) if inner else ([], {})
    of_groups = [group["step"] for group in groups if "step" in group]
    return {float(step) for step in [*of_groups, *(s["step"] for s in states.values() if "step" in s)]}


def _refuse_other_step(found, state, path):
    """Raises CheckpointError where an optimiser has done more steps than the run that the model
    states in `path` are of, or its ranks (file, steps) have done different numbers.
    """
    done = state.get("global_steps", state.get("iteration"))
    for other, step in found:
        if done is not None and step > done:
            raise CheckpointError(
                f"{other}: its optimiser has done {step:g} steps, {path.name} is of step {done}; parts of "
                "different checkpoints, copy the whole folder"
            )
        if step != found[0][1]:
            raise CheckpointError(
                f"{other}: its optimiser has done {step:g} steps, that in {found[0][0].name} "
                f"{found[0][1]:g}; parts of different checkpoints, copy the whole folder"
            )


def coupled_decay(inner):
    """Whether an optimiser's state dict says that weight decay enters the gradient."""
    return any(group.get("decoupled_weight_decay") is False for group in inner.get("param_groups", []))


def _plain(module, prefix=""):
    """{name: tensor} of a state dict, nested ones flattened; what is no tensor is left out."""
    found = {}
    for name, value in (module or {}).items():
        if isinstance(value, dict):
            found |= _plain(value, f"{prefix}{name}.")
        elif torch.is_tensor(value):
            _require_dense(value, f"{prefix}{name}")
            found[f"{prefix}{name}"] = value
    return found


def _require_dense(tensor, name):
    if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
        raise ValueError(f"{name} is sparse, complex or quantised")


def _expected(content, key, path):
    if not isinstance(content, dict) or key not in content:
        raise CheckpointError(f"{path}: has no `{key}`; it is no checkpoint of DeepSpeed, or it is damaged")
    return content[key]


def corrected_moments(state, group, path):
    """Bias-corrected second moments of one optimiser state, or None before the first step and for
    other optimisers.
    """
    if "exp_avg_sq" not in state:
        return None
    step = float(state.get("step", group.get("step", 0)))
    if not step:
        return None
    if not step > 0 or step % 1:
        raise CheckpointError(f"{path}: its optimiser has done {step:g} steps; copy the file again")
    if "betas" not in group:
        raise CheckpointError(f"{path}: its optimiser names no betas; write --metric identity")
    _require_dense(state["exp_avg_sq"], "exp_avg_sq")
    beta = group["betas"][1]
    if not 0 <= beta < 1:
        raise CheckpointError(f"{path}: its optimiser has a beta of {beta:g}; write --metric identity")
    return state["exp_avg_sq"].float() / (1 - beta**step)


def _of_fragments(shards, state, module):
    """(moments, decays) from the optimiser shards [(path, content)] of ZeRO 1 and 2, in the order
    of data-parallel ranks.
    """
    first = shards[0][0]
    with reading(first):
        shapes = {n: s for group in state.get("param_shapes") or [] for n, s in group.items()}
    pieces, decays, steps, complete, met = {}, {}, [], True, {}
    for path, shard in shards:
        with reading(path):
            optimizer = _expected(shard, "optimizer_state_dict", path)
            inner = _expected(optimizer, "base_optimizer_state", path)
            mappings = optimizer.get("param_slice_mappings")
            if mappings is None:
                raise CheckpointError(
                    f"{path}: does not say where its parameters lie (deepspeed before 0.8, or "
                    "round_robin_gradients); write --metric identity"
                )
            groups, states = _groups(inner, path)
            steps += [(path, step) for step in steps_done(inner, path)]
            masters = optimizer.get("single_partition_of_fp32_groups") or []
            for i, mapping in enumerate(mappings):
                group = groups[i] if i < len(groups) else {}
                decays |= {name: bool(group.get("weight_decay")) for name in mapping}
                flat = corrected_moments(states.get(i, {}), group, path)
                complete &= flat is not None
                for name, place in mapping.items():
                    begin, length = place.start, place.numel
                    before = met.get(name, 0)  # numbers of it in the shards before
                    met[name] = before + length
                    if i < len(masters):
                        master = masters[i].reshape(-1)[begin : begin + length]
                        _refuse_other_weights(path, name, master, module.get(name), before)
                    if flat is not None:
                        pieces.setdefault(name, []).append(flat[begin : begin + length].reshape(-1))
    with reading(first):
        _refuse_other_step(steps, state, first)
    if not complete or not pieces:
        return None, decays
    return _joined(pieces, shapes, first), decays


def _refuse_other_weights(path, name, master, whole, begin):
    """Raises CheckpointError where the first numbers of an optimiser's own float32 copy of a
    fragment are not those of the model states, from number `begin` of the parameter on.
    """
    if whole is None or whole.numel() == 0:
        return
    own = whole.reshape(-1)[begin : begin + min(master.numel(), LOOK)]
    rounded = master[:LOOK].to(own.dtype)
    if own.shape != rounded.shape or not torch.equal(own.nan_to_num(), rounded.nan_to_num()):
        raise CheckpointError(
            f"{path}: its {name} is not that of the model states; parts of different checkpoints, copy the "
            "whole folder"
        )


def _groups(inner, path):
    """(param_groups, {index: state}) of an optimiser's state dict, or of the lists that elastic
    checkpoints keep.
    """
    if isinstance(inner, dict) and "param_groups" in inner:
        return inner["param_groups"], inner.get("state", {})
    raise CheckpointError(f"{path}: an elastic checkpoint, which is not read; write --metric identity")


def _joined(pieces, shapes, path):
    found = {}
    for name, parts in pieces.items():
        flat = torch.cat([part.reshape(-1) for part in parts])
        shape = shapes.get(name)
        if shape is None or flat.numel() != math.prod(shape):
            raise CheckpointError(
                f"{path}: of {name} the shards hold {flat.numel()} numbers, the model {tuple(shape or ())}; "
                "a rank's file is missing or of another checkpoint, copy the whole folder"
            )
        found[name] = flat.view(*shape)
    return found


def _of_whole(optimizer, module, path):
    """(moments, decays) from an optimiser that is not sharded: its states in the order of its
    groups.
    """
    if not optimizer or not optimizer.get("state"):
        return None, {}
    groups, states = _groups(optimizer, path)
    by_decay = [[name for name, p in module.items() if (p.dim() > 1) == decayed] for decayed in (True, False)]
    order = [name for names in by_decay for name in names]
    numbers = [number for group in groups for number in group["params"]]
    if len(numbers) != len(order):
        return None, {}
    moments, decays = {}, {}
    of_number = {number: group for group in groups for number in group["params"]}
    for name, number in zip(order, numbers, strict=True):
        group = of_number[number]
        decays[name] = bool(group.get("weight_decay"))
        found = corrected_moments(states.get(number, {}), group, path)
        if found is None or found.shape != module[name].shape:
            return None, {}
        moments[name] = found
    return moments, decays


def _of_stage_3(files, rank, own):
    """All of ZeRO 3: parameters from the float32 shards of the optimiser, in the precision that the
    module had.
    """
    path = files.shards[0, rank]
    state = load(path)
    shapes = _expected(state, "param_shapes", path)
    stored = _plain(_expected(state, "module", path))
    optimizers = [_expected(load(own[data]), "optimizer_state_dict", own[data]) for data in sorted(own)]
    if len(optimizers) != len({data for data, model in files.shards if model == rank}) or not optimizers:
        raise CheckpointError(
            f"{path}: has no optimiser states beside it; under ZeRO 3 they hold the parameters, copy the "
            "whole folder"
        )
    _require_shards(path, state, own)
    flats = [list(o.get("fp32_flat_groups") or []) for o in optimizers]
    inners = [_expected(o, "optimizer_state_dict", path) for o in optimizers]
    groups = [_groups(inner, path) for inner in inners]
    steps = [
        (own[data], step)
        for data, inner in zip(sorted(own), inners, strict=True)
        for step in steps_done(inner, path)
    ]
    _refuse_other_step(steps, state, path)
    decays, moments = {}, {}
    corrected = [
        [corrected_moments(states.get(i, {}), _at(of, i, len(shapes)), path) for i in range(len(flat))]
        for (of, states), flat in zip(groups, flats, strict=True)
    ]
    whole = _cut(flats, shapes, path)
    parameters = {name: p.to(stored[name].dtype) for name, p in whole.items()}
    if all(part is not None for parts in corrected for part in parts):
        moments = _cut(corrected, shapes, path)
    for names, group in zip(shapes, groups[0][0], strict=False):
        decays |= {name: bool(group.get("weight_decay")) for name in names}
    coupled = coupled_decay({"param_groups": groups[0][0]})
    return RankState(
        parameters=parameters, moments=moments or None, decays=decays, state=state, coupled=coupled
    )


def _at(groups, index, expected):
    """The settings of a flat group: several of them may belong to one optimiser group
    (sub_group_size).
    """
    return groups[index] if len(groups) == expected and index < len(groups) else groups[-1]


def _cut(flats, shapes, path):
    """{name: whole tensor} from the flat groups of every rank: of each parameter the rank's range,
    padded at the end.
    """
    joined = [torch.cat([flat.reshape(-1) for flat in parts]) for parts in flats]
    ranks, found, at = len(joined), {}, 0
    for name, shape in ((n, s) for group in shapes for n, s in group.items()):
        count = math.prod(shape)
        length = -(-count // ranks)
        whole = torch.cat([flat[at : at + length] for flat in joined])
        if whole.numel() < count:
            raise CheckpointError(
                f"{path}: the shards end inside {name}; a rank's file is missing or damaged, copy the whole "
                "folder"
            )
        found[name], at = whole[:count].view(*shape), at + length
    if any(flat.numel() < at for flat in joined):
        raise CheckpointError(f"{path}: the shards are shorter than the model; copy the whole folder")
    return found
