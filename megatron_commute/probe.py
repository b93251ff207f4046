"""One measurement of the criterion: gradients -> direction -> Hessian-vector products -> brackets with error bars.

A probe is S independent replicates ("splits"). Each has sequences and a direction of its own, so the spread between
replicates is the whole sampling error, that of the direction included, and no reuse of samples biases a product.
Within a replicate g_k and H_k u of a domain share a batch, which is harmless: P never uses M[k, k], and the gradient and
the product in M[k, j], k != j, come from different domains. Replicates are dealt to teams of data-parallel ranks; vectors
of model size travel inside a team only (not at all while there are at least as many splits as ranks), then numbers.
"""

import contextlib
import dataclasses
import math
import time

import numpy as np
import torch

from megatron_commute import bracket, hvp, ops, reduce


@dataclasses.dataclass(frozen=True)
class Model:
    """What a probe needs of a model; adapters build it.

    parameters: () -> float32 or float64 tensors at which to measure, one per trainable parameter of this rank
    loss: (parameters, tokens i64[b, seq_length + 1]) -> mean loss in nats per token; must not write to anything
    owned: per parameter, False where another model-parallel rank holds the same values and counts them already
    decayed: per parameter, whether the optimiser's decoupled weight decay acts on it
    metric: name -> diagonal D of the optimiser's flow as a list of tensors, or None for the identity; collective
    quiet: (method) -> context manager: dropout off, random state kept, and double backward possible where `exact` asks
    micro_batch: sequences of one forward pass
    verify: (parameters, tokens) -> None, raises where the exact method is wrong on this model; cheap once it has passed
    """

    parameters: object
    loss: object
    owned: tuple
    decayed: tuple
    metric: object
    quiet: object
    micro_batch: int
    verify: object = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Criterion under T targets and K domains, float64. Errors are standard errors over the S replicates.

    M [T, K, K], P [T, K, K], P_se, s [T, K], s_se, u_g [T, K], h_theta [T, K]; score [T, K]: s with the weight-decay and
    learning-rate terms, relative to the mixture's own (sum_k w_k score_k = 0); score_se.
    replicates: M of each, [S, T, K, K]. step: median eps of the difference method, else None.
    """

    M: np.ndarray
    P: np.ndarray
    P_se: np.ndarray
    s: np.ndarray
    s_se: np.ndarray
    u_g: np.ndarray
    h_theta: np.ndarray
    score: np.ndarray
    score_se: np.ndarray
    replicates: np.ndarray
    step: float | None


class ProbeFailed(RuntimeError):
    """A probe that all ranks agreed to give up; training goes on untouched."""


def direction_samples(samples, splits):
    """Sequences per domain that the direction of one replicate takes: half of what its gradients take, at least one."""
    return max(1, samples // splits // 2)


def measure(model, groups, team, draw, settings, targets, weights, flow, time_limit=None):
    """Measure the criterion on held-out sequences; collective over all ranks of `groups`.

    draw: (part, domain, numbers i64[n]) -> tokens i64[n, seq_length + 1], part "direction" or "gradient", numbers counted
    from 0 within this probe. settings: samples, splits, method, metric of the configuration. targets: f64[T, K].
    weights: f64[K] in force. flow: (decay, (e1, e2)) of bracket.full_score. time_limit: seconds, soft, or None.
    Raises ProbeFailed on every rank when any rank met bad data, a non-finite value, an exception or the time limit.
    """
    domains = targets.shape[1]
    deadline = None if time_limit is None else time.monotonic() + time_limit
    ballot = _Ballot(groups, deadline)
    numbers = np.zeros((settings.splits, len(targets), domains + 4, domains))
    with ballot.section("preparing"):
        params = [p.detach() for p in model.parameters()]
        memory = [_zeros(params) for _ in range(2 * domains)]
        sample = draw("gradient", 0, np.arange(1))
    ballot.settle()
    if settings.method == "exact" and model.verify is not None:
        with model.quiet("difference"), ballot.section("self-verification of method exact"):
            model.verify(params, sample)
        ballot.settle()
    with model.quiet(settings.method):
        metric = None
        with ballot.section("metric"):
            metric = model.metric(settings.metric)
        ballot.settle()
        work = _Replicate(model, groups, team, draw, settings, params, metric, memory, ballot)
        for turn in range(team.rounds):
            split = team.splits[turn] if turn < len(team.splits) else None
            work.run(split, targets, numbers)
    ballot.settle()
    table = reduce.sum_of_numbers(numbers, groups.world)
    if not np.isfinite(table).all():
        raise ProbeFailed("the contractions are not finite; the weights stay as they are")
    return _summary(table, weights, flow)


def _summary(table, weights, flow):
    """Means and standard errors over replicates of the table [S, T, K + 4, K] that `_Replicate.run` fills."""
    K = table.shape[-1]
    M, u_g, u_g_decayed, h_theta = (
        table[..., :K, :],
        table[..., K, :],
        table[..., K + 1, :],
        table[..., K + 2, :],
    )
    P = bracket.pairwise(M)
    s = bracket.scores(P, np.broadcast_to(weights, P.shape[:-1]))
    decay, times = flow
    score = bracket.full_score(s, u_g, h_theta, decay, times, u_g_decayed)
    score = score - (score @ weights)[..., None]
    steps = table[..., K + 3, 0]
    return Measurement(
        *(M.mean(0), P.mean(0), _error(P), s.mean(0), _error(s), u_g.mean(0), h_theta.mean(0)),
        *(score.mean(0), _error(score), M, float(np.median(steps)) if steps.any() else None),
    )


def _error(replicates):
    return replicates.std(0, ddof=1) / math.sqrt(len(replicates))


class _Ballot:
    """Faults in rank-local sections are kept until all ranks vote, so that no rank waits in a collective alone."""

    def __init__(self, groups, deadline):
        self.groups, self.deadline, self.fault = groups, deadline, None

    @contextlib.contextmanager
    def section(self, name):
        try:
            yield
        except Exception as fault:
            self.fault = self.fault or f"{name}: {type(fault).__name__}: {fault}"

    def late(self):
        return self.deadline is not None and time.monotonic() > self.deadline

    def settle(self):
        if not reduce.any_rank(self.fault, self.groups.world):
            return
        texts = reduce.gather_text(self.fault or "", self.groups)
        raise ProbeFailed("; ".join(f"rank {r}: {text}" for r, text in enumerate(texts) if text))


class _Replicate:
    """The work on one replicate at a time, in memory that is allocated once per probe: 2 K vectors beside the direction."""

    def __init__(self, model, groups, team, draw, settings, params, metric, memory, ballot):
        self.model, self.groups, self.team, self.draw, self.settings = model, groups, team, draw, settings
        self.params, self.metric, self.ballot = params, metric, ballot
        half = len(memory) // 2
        self.g, self.h = memory[:half], memory[half:]
        self.once = [i for i, owned in enumerate(model.owned) if owned]
        self.decaying = [i for i in self.once if model.decayed[i]]

    def run(self, split, targets, numbers):
        """Fill numbers[split] with this rank's share of [M; u.g; u.g over decayed parameters; h.theta; eps]."""
        slopes = self._direction(split, [k for k in range(targets.shape[1]) if targets[:, k].any()])
        for t, target in enumerate(targets):
            u, step = self._displacement(split, slopes, target)
            with self.ballot.section("Hessian-vector products"):
                if split is not None:
                    self._vectors(split, u, step)
            self.ballot.settle()
            if split is not None:
                for vector in self.g:
                    reduce.sum_of_vectors(vector, self.team.group)
                with self.ballot.section("contractions"):
                    self._contract(u, step, numbers[split, t])

    def _direction(self, split, wanted):
        """Gradient of every wanted domain on this replicate's direction samples, summed over the team."""
        n = direction_samples(self.settings.samples, self.settings.splits)
        slopes = {}
        with self.ballot.section("direction"):
            for k in wanted if split is not None else ():
                with self._agreed():
                    slopes[k] = _zeros(self.params)
                for tokens, share in self._batches("direction", k, split, n):
                    _add(slopes[k], self._gradient(tokens, self.params), share)
        self.ballot.settle()
        for slope in slopes.values():
            reduce.sum_of_vectors(slope, self.team.group)
        return slopes

    def _displacement(self, split, slopes, target):
        """Direction u = D sum_k target_k g_k and the eps of the difference (global norms, equal on all model ranks)."""
        u, step, squares = None, None, np.zeros(2)
        with self.ballot.section("displacement"):
            if split is not None:
                u = _zeros(self.params)
                for k, slope in slopes.items():
                    _add(u, slope, float(target[k]))
                if self.metric is not None:
                    torch._foreach_mul_(u, self.metric)
                squares = np.array([_dot(v, v, self.once) for v in (u, self.params)])
        squares = reduce.sum_of_numbers(squares, self.groups.model)
        with self.ballot.section("displacement"):
            if u is not None:
                step = hvp.difference_step(self.params, u, v_square=squares[0], params_square=squares[1])
        self.ballot.settle()
        return u, step

    def _vectors(self, split, u, step):
        """g_k and h_k = H_k u of every domain on this rank's share of the replicate."""
        n = self.settings.samples // self.settings.splits
        for vector in (*self.g, *self.h):
            torch._foreach_zero_(vector)
        if self.settings.method == "exact":
            for k in range(len(self.g)):
                for tokens, share in self._batches("gradient", k, split, n):
                    with self._agreed():
                        product = hvp.gradient_and_product(self._loss(tokens), self.params, u, "exact", step)
                    _add(self.g[k], product.gradient, share)
                    _add(self.h[k], product.product, share)
            return
        for sign in (1.0, -1.0):
            with self._agreed():
                displaced = ops.displace(self.params, u, sign * step)
            for k in range(len(self.g)):
                for tokens, share in self._batches("gradient", k, split, n):
                    slope = self._gradient(tokens, displaced)
                    _add(self.g[k], slope, share / 2)
                    _add(self.h[k], slope, sign * share / (2 * step))

    def _contract(self, u, step, out):
        """Inner products over the parameters this rank counts. g is the team's, h this rank's share, so M sums up."""
        K = len(self.g)
        g, h = [_pick(v, self.once) for v in self.g], [_pick(v, self.once) for v in self.h]
        out[:K] = ops.gram(h, g, None if self.metric is None else _pick(self.metric, self.once)).cpu().numpy()
        out[K + 2] = [_dot(v, self.params, self.decaying) for v in self.h]
        if self.team.rank == 0:
            out[K] = [_dot(u, v, self.once) for v in self.g]
            out[K + 1] = [_dot(u, v, self.decaying) for v in self.g]
            if reduce.rank_in(self.groups.model) == 0 and self.settings.method == "difference":
                out[K + 3, 0] = step

    def _batches(self, part, domain, split, n):
        """This rank's micro-batches of a replicate's n sequences, each with its share of the mean over the replicate."""
        numbers = np.arange(split * n, (split + 1) * n)[self.team.rank :: self.team.size]
        for start in range(0, len(numbers), self.model.micro_batch):
            chunk = numbers[start : start + self.model.micro_batch]
            with self._agreed():
                tokens = self.draw(part, domain, chunk)
                if self.ballot.late():
                    raise TimeoutError("the probe ran past probe.time_limit; raise it or lower probe.samples")
            yield tokens, len(chunk) / n

    def _gradient(self, tokens, at):
        with self._agreed():
            slope = hvp.gradient(self._loss(tokens), at)
        return slope

    def _loss(self, tokens):
        return lambda params: self.model.loss(params, tokens)

    def _agreed(self):
        """Model-parallel ranks must leave the micro-batch loop together, or one waits in a forward pass alone."""
        return reduce.agreed(self.groups.model)


def _zeros(params):
    return [torch.zeros_like(p) for p in params]


def _add(into, vector, scale):
    torch._foreach_add_(into, [v.to(i.dtype) for i, v in zip(into, vector, strict=True)], alpha=scale)


def _pick(vector, indices):
    return [vector[i] for i in indices]


def _dot(a, b, indices):
    """Inner product over the tensors `indices`, a float in float64; 0 where there are none."""
    return float(ops.gram([_pick(a, indices)], [_pick(b, indices)])) if indices else 0.0
