"""One measurement of the criterion: gradients -> direction -> Hessian-vector products -> brackets
with error bars.

A probe is S independent replicates ("splits"). Each has sequences and a direction of its own, so
the spread between replicates is the whole sampling error, that of the direction included, and no
reuse of samples biases a product. Within a replicate g_k and H_k u of a domain share a batch, which
is harmless: P never uses M[k, k], and the gradient and the product in M[k, j], k != j, come from
different domains. Replicates are dealt to teams of data-parallel ranks; vectors of model size
travel inside a team only (not at all while there are at least as many splits as ranks), then
numbers.
"""

import contextlib
import dataclasses
import math
import os
import time
import traceback

import numpy as np
import torch

from megatron_commute import bracket, hvp, reduce
from megatron_commute.measure import replicate_ways
from megatron_commute.measure.model import in_shards
from megatron_commute.settings import memory

__all__ = ["Measurement", "ProbeFailed", "choose_memory", "measure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The criterion under T targets and K domains, float64, with standard errors over the S
    replicates.

    With probe.memory scores M, P, P_se and replicates are not measured: NaN.
    """

    M: np.ndarray
    # [T, K, K], of bracket
    P: np.ndarray
    # [T, K, K], Lie brackets contracted with the direction
    P_se: np.ndarray
    # its standard error
    s: np.ndarray
    # [T, K], local scores
    s_se: np.ndarray
    # their standard errors
    u_g: np.ndarray
    # [T, K], direction times gradient
    h_theta: np.ndarray
    # [T, K], Hessian-vector product times decayed parameters
    score: np.ndarray
    # [T, K], s with the terms of weight decay and learning rate, less the mixture's own: sum_k w_k
    # score_k = 0
    score_se: np.ndarray
    # its standard error
    gap_se: np.ndarray
    # [T, K, K], standard error of score_i - score_j
    replicates: np.ndarray
    # [S, T, K, K], M of each replicate
    step: float | None
    # median eps of the difference of gradients, or None
    numerical: np.ndarray
    # [T], error of that difference in P by rounding and truncation, from u.H u of one sequence a
    # domain at eps and 2 eps (hvp.difference_error), the worst domain's; in every standard error,
    # in quadrature. Zero for other methods


class ProbeFailed(RuntimeError):
    """A probe that all ranks agreed to give up; training goes on untouched."""


def measure(model, groups, team, draw, settings, targets, weights, flow, time_limit=None, *, direction=None):
    """Measure the criterion on held-out sequences; collective over all ranks of `groups`.

    draw: (part, domain, numbers i64[n]) -> tokens i64[n, seq_length + 1], part "direction" or
    "gradient", numbers counted from 0 within this probe. settings: samples, splits, method, metric
    of the configuration. targets: f64[T, K]. weights: f64[K] in force. flow: (decay, (e1, e2)) of
    bracket.full_score. time_limit: seconds, soft, or None. direction: what the brackets are
    contracted with, D not yet applied: None, the target's gradient at the parameters of now; or a
    vector a target, such as its gradient at a later checkpoint; or (target f64[K], split) ->
    vector. A vector is what this rank holds of it, a list like `parameters`. Errors know of its
    noise only where every split has its own. Raises ProbeFailed on every rank when any rank met bad
    data, a non-finite value, an exception or the time limit.
    """
    model, team = _working(model, groups, team, settings)
    deadline = None if time_limit is None else time.monotonic() + time_limit
    ballot = _Ballot(groups, deadline)
    way = replicate_ways.way(settings.memory)
    numbers = np.zeros((settings.splits, len(targets), way.rows(len(weights)), len(weights)))
    checks = np.zeros((len(targets), len(weights), 6))
    params = sample = work = None
    with ballot.section("preparing"):
        _refuse(model, settings.method)
        params = [p.detach() for p in model.parameters()]
        sample = draw("gradient", 0, np.arange(1))
    if settings.method != "difference" and model.verify is not None:
        ballot.settle()
        with model.quiet("difference"), ballot.section(f"self-verification of method {settings.method}"):
            model.verify(params, sample)
        ballot.settle()
    with ballot.section("preparing"):
        work = way(
            model=model,
            groups=groups,
            team=team,
            draw=draw,
            settings=settings,
            params=params,
            weights=weights,
            ballot=ballot,
            direction=direction,
        )
    ballot.settle()
    with model.quiet(settings.method):
        with ballot.section("metric"):
            work.metric = work.keep.taken(model.metric(settings.metric))
        ballot.settle()
        for turn in range(team.rounds):
            split = team.splits[turn] if turn < len(team.splits) else None
            work.run(split, targets, numbers, checks)
    ballot.settle()
    table = reduce.sum_of_numbers(np.concatenate([numbers.ravel(), checks.ravel()]), groups.world)
    if not np.isfinite(table).all():
        raise ProbeFailed("the contractions are not finite; the weights stay as they are")
    numbers, checks = (
        table[: numbers.size].reshape(numbers.shape),
        table[numbers.size :].reshape(checks.shape),
    )
    return _summary(numbers, _numerical(checks), weights, flow)


def _working(model, groups, team, settings):
    """The model and the team of a probe: where vectors lie in shards, they are sums over all
    data-parallel ranks.
    """
    ranks = reduce.size(groups.data)
    if ranks > 1 and memory.shares(settings.memory, settings.method):
        model = in_shards(model, groups)
    if model.together and team.size < ranks:
        team = reduce.team(groups, settings.splits, together=True)
    return model, team


def _refuse(model, method):
    if method == "fused" and model.fused is None:
        raise ValueError("this model has no hand-written pass: write method difference or exact")
    if method != "difference" and model.gradient is not None:
        raise ValueError(
            f"method {method} needs a model that one rank runs as a whole: write method difference"
        )


def _numerical(checks):
    """Error of P [T] from what _check of `replicate` has found, the worst domain's.

    Errors of the parameter tensors add up where truncation rules and are independent where rounding
    does. What is off in a gradient, relative to the largest, is off in every contraction with it. P
    is a difference of two contractions.
    """
    product, gradient = np.moveaxis(checks[..., :3], -1, 0), np.moveaxis(checks[..., 3:], -1, 0)
    of_product, of_gradient = (np.sqrt(np.maximum(a**2, b)).max(-1) for _, a, b in (product, gradient))
    curvature, slope = (np.abs(part[0]).max(-1) for part in (product, gradient))
    relative = np.divide(of_gradient, slope, out=np.zeros_like(slope), where=slope > 0)
    return math.sqrt(2) * np.hypot(of_product / math.sqrt(hvp.DIFFERENCE_FACTOR), relative * curvature / 3)


def _summary(table, numerical, weights, flow):
    """Means and standard errors over replicates of the table [S, T, rows, K] that a way of
    `replicate_ways` fills.
    """
    K = table.shape[-1]
    measured, (u_g, u_g_decayed, h_theta, steps) = table[..., :-4, :], np.moveaxis(table[..., -4:, :], -2, 0)
    if measured.shape[-2] == K:
        M = measured
        P = bracket.pairwise(M)
        s = bracket.scores(P, np.broadcast_to(weights, P.shape[:-1]))
    else:
        M = P = np.full((*u_g.shape, K), np.nan)
        s = measured[..., 0, :]
    decay, times = flow
    score = bracket.full_score(s, u_g, h_theta, decay, times, u_g_decayed)
    score = score - (score @ weights)[..., None]
    gaps = score[..., :, None] - score[..., None, :]
    steps = steps[..., 0]
    apart, row = (1 - np.eye(K)) * numerical[:, None, None], numerical[:, None] * (K > 1)
    return Measurement(
        M=M.mean(0),
        P=P.mean(0),
        P_se=_error(P, apart),
        s=s.mean(0),
        s_se=_error(s, row),
        u_g=u_g.mean(0),
        h_theta=h_theta.mean(0),
        score=score.mean(0),
        score_se=_error(score, row),
        gap_se=_error(gaps, math.sqrt(2) * apart),
        replicates=M,
        step=float(np.median(steps)) if steps.any() else None,
        numerical=numerical,
    )


def _error(replicates, numerical):
    """Standard error of the mean over replicates, the numerical error of each included."""
    return np.hypot(replicates.std(0, ddof=1) / math.sqrt(len(replicates)), numerical)


def choose_memory(model, groups, settings, domains):
    """memory.Memory of this run's probes by probe.memory, the same on all ranks: each way counts by
    the rank with the least room for it. Collective.
    """
    ranks = reduce.size(groups.data)
    one, devices = zip(*((p.numel() * p.element_size(), p.device) for p in model.parameters()), strict=True)
    parts = ranks if model.together else 1  # of the whole, that `one` tells
    whole, largest = sum(one) * parts, max(one) * parts
    demand = memory.Demand(
        domains=domains,
        method=settings.method,
        metric=settings.metric,
        ranks=ranks,
        low_precision=model.low_precision,
        offload=settings.offload,
    )
    any_shards = model.shards is not None
    possible = memory.possible(settings.method, ranks, only_shards=model.together, any_shards=any_shards)
    needed = {mode: memory.size(mode, demand, whole=whole, largest=largest) for mode in possible}
    room = _free_memory(devices[0], groups) / 2 if settings.memory == "auto" else 1
    loads = np.array([needed[mode] / max(room, 1) for mode in possible])
    loads = reduce.max_of_numbers(loads, groups.world)
    mode = memory.choose(settings.memory, dict(zip(possible, loads.tolist(), strict=True)))
    kept = memory.host_size(mode, demand, whole)
    most, kept = np.ceil(reduce.max_of_numbers(np.array([needed[mode], kept]), groups.world)).tolist()
    words, beside = memory.formula(mode, demand), memory.layers(mode, demand)
    return memory.Memory(mode, int(most), words, beside, int(kept))


def _free_memory(device, groups):
    """Bytes that this rank may count on: what its GPU has free, or its share of the free memory of
    the host.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", reduce.size(groups.world)))
    return psutil.virtual_memory().available / ranks


def _said(fault):
    """What an exception says; for one without words, such as a bare assert, where it was raised."""
    if words := str(fault).strip():
        return words
    frames = traceback.extract_tb(fault.__traceback__)
    return (
        f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}: {frames[-1].line}" if frames else "-"
    )


class _Ballot:
    """Faults in rank-local sections are kept until all ranks vote, so that no rank waits in a
    collective alone.
    """

    def __init__(self, groups, deadline):
        self.groups, self.deadline, self.fault = groups, deadline, None

    @contextlib.contextmanager
    def section(self, name):
        try:
            yield
        except Exception as fault:
            self.fault = self.fault or f"{name}: {type(fault).__name__}: {_said(fault)}"

    def late(self):
        return self.deadline is not None and time.monotonic() > self.deadline

    def settle(self):
        if not reduce.any_rank(self.fault, self.groups.world):
            return
        texts = reduce.gather_text(self.fault or "", self.groups)
        raise ProbeFailed("; ".join(f"rank {r}: {text}" for r, text in enumerate(texts) if text))
