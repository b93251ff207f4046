"""The work of a probe on one replicate: direction, gradients, products and contractions, in three ways.

The ways differ in what they hold (megatron_commute.memory) and agree in their numbers: rows of a table that is summed
over all ranks. Parameters are read, never written.
"""

import numpy as np
import torch

from megatron_commute import hvp, ops, reduce
from megatron_commute.config import direction_samples


class _Replicate:
    """What the three ways share: one replicate at a time, in memory that is allocated once per probe.

    Rows of numbers[split, target], K columns: what `_products` measures, then u.g, u.g over decayed parameters, h.theta,
    and eps in the first column. `metric` is set before the first `run`.
    """

    def __init__(self, model, groups, team, draw, settings, params, weights, ballot, direction=None):
        self.model, self.groups, self.team, self.draw, self.settings = model, groups, team, draw, settings
        self.params, self.weights, self.ballot, self.metric = params, weights, ballot, None
        self.direction = direction
        self.signs = (1.0, -1.0) if settings.method == "difference" else (0.0,)
        self.once = [i for i, owned in enumerate(model.owned) if owned]
        self.decaying = [i for i in self.once if model.decayed[i]]
        # whose numbers make up those of one vector, and which ranks add vectors up: with shards the model has done so
        self.holders = groups.world if model.together else groups.model
        self.adders = None if model.together else team.group
        self.u = _zeros(params)

    @staticmethod
    def rows(domains):
        """Rows of the table: those of M and the four others."""
        return domains + 4

    def run(self, split, targets, numbers, checks):
        """Fill numbers[split] with this rank's share, which sums over all ranks; split: None for a rank without work.
        checks [targets, K, 6]: likewise, of `_check`, by the ranks that work on the first split."""
        for t, target in enumerate(targets):
            if self.direction is None:
                self._gradient_of_target(split, target)
            else:
                self._given(split, target, t)
            step = self._displacement(split)
            if self.settings.method == "difference":
                if split == 0:
                    self._check(step, checks[t])
                self.ballot.settle()
            self._products(split, step, None if split is None else numbers[split, t])

    def _given(self, split, target, t):
        """u = the direction of target number t from outside, which needs no sum over the team."""
        with self.ballot.section("direction"):
            if split is not None:
                given = self.direction(target, split) if callable(self.direction) else self.direction[t]
                shapes = [[tuple(v.shape) for v in vector] for vector in (given, self.params)]
                if shapes[0] != shapes[1]:
                    raise ValueError("its shapes differ: give one tensor like each of the model's parameters")
                torch._foreach_copy_(self.u, hvp.finite(given, "the direction"))
        self.ballot.settle()

    def _gradient_of_target(self, split, target):
        """u = sum_k target_k g_k on this replicate's direction samples, summed over the team."""
        n = direction_samples(self.settings.samples, self.settings.splits)
        with self.ballot.section("direction"):
            torch._foreach_zero_(self.u)
            for k in np.flatnonzero(target).tolist() if split is not None else ():
                for vector, share in self._gradients("direction", k, split, n, self.params):
                    _add(self.u, vector, share * float(target[k]))
                    del vector
        self.ballot.settle()
        if split is not None:
            reduce.sum_of_vectors(self.u, self.adders)

    def _displacement(self, split):
        """Turn the gradient into u = D g; the eps of the difference (global norms, equal on all model ranks)."""
        step, squares = None, np.zeros(2)
        with self.ballot.section("displacement"):
            if split is not None:
                if self.metric is not None:
                    torch._foreach_mul_(self.u, self.metric)
                squares = np.array([_dot(v, v, self.once) for v in (self.u, self.params)])
        squares = reduce.sum_of_numbers(squares, self.holders)
        with self.ballot.section("displacement"):
            if split is not None:
                step = hvp.difference_step(self.params, self.u, v_square=squares[0], params_square=squares[1])
        self.ballot.settle()
        return step

    def _check(self, step, out):
        """For every domain u.H u and u.g of one sequence from gradients at +-eps; how far either is off at +-2 eps; that
        of each parameter tensor, squared and summed. Costs four gradients of one sequence a domain (of one on every rank
        where vectors are shards)."""
        if self.team.rank and not self.model.together:
            return
        share = 1 / self.team.size if self.model.together else 1.0
        along = np.zeros((4, len(out), len(self.once)))
        with self.ballot.section("numerical error"):
            for i, scale in enumerate((1.0, -1.0, 2.0, -2.0)):
                at = self._displaced(scale, step)
                for k in range(len(out)):
                    with self._agreed():
                        tokens = self.draw("gradient", k, np.array([self.team.rank]))
                    for vector, part in self._slopes(at, iter([(tokens, share)])):
                        along[i, k] = [part * _dot(self.u, vector, [j]) for j in self.once]
                        del vector
                del at
            near, far = (along[0] - along[1]) / (2 * step), (along[2] - along[3]) / (4 * step)
            for at, one, two in (0, near, far), (3, along[:2].mean(0), along[2:].mean(0)):
                out[:, at : at + 3].T[:] = one.sum(1), (one - two).sum(1), ((one - two) ** 2).sum(1)

    def _sweep(self, split, step, take, domains):
        """take(k, vector, to_g, to_h) for every gradient of `domains`: g_k = sum to_g vector, h_k = sum to_h vector."""
        for sign in self.signs:
            at = self._displaced(sign, step)
            for k in domains:
                self._visit(k, split, step, sign, at, take)
            del at  # before the other side is built

    def _displaced(self, sign, step):
        with self._agreed():
            return ops.displace(self.params, self.u, sign * step) if sign else None

    def _visit(self, k, split, step, sign, at, take):
        """One domain's share of `_sweep`. Vectors are handed over without a name, so that two never live at once."""
        n = self.settings.samples // self.settings.splits
        if sign:
            for vector, share in self._gradients("gradient", k, split, n, at):
                take(k, vector, share / 2, sign * share / (2 * step))
                del vector
            return
        for tokens, share in self._batches("gradient", k, split, n):
            with self._agreed():
                found = self._pair(tokens, step)
            take(k, found.gradient, share, 0.0)
            take(k, found.product, 0.0, share)
            del found

    def _pair(self, tokens, step):
        """Gradient and product of one micro-batch by a method that gives both in one pass."""
        if self.settings.method == "fused":
            found = self.model.fused(self.params, self.u, tokens)
            hvp.finite(found.gradient, "the gradient")
            hvp.finite(found.product, "the Hessian-vector product")
            return found
        return hvp.gradient_and_product(self._loss(tokens), self.params, self.u, "exact", step)

    def _gradients(self, part, domain, split, n, at):
        """(vector, share) of this rank's micro-batches at the tensors `at`; of all of them at once where the model asks."""
        return self._slopes(at, self._batches(part, domain, split, n))

    def _slopes(self, at, batches):
        if self.model.gradient is None:
            for tokens, share in batches:
                yield self._gradient(tokens, at), share
            return
        with self._agreed():
            found = hvp.finite(self.model.gradient(at, batches), "the gradient")
        yield found, 1.0

    def _note_step(self, step, out):
        first = self.team.rank == 0 and reduce.rank_in(self.groups.model) == 0
        if first and self.settings.method == "difference":
            out[-1, 0] = step

    def _batches(self, part, domain, split, n):
        """This rank's micro-batches of a replicate's n sequences, each with its share of the mean over the replicate.

        Models that run micro-batches together get as many on every rank of the team: some may be there for nothing.
        """
        numbers = np.arange(split * n, (split + 1) * n)[self.team.rank :: self.team.size]
        most = -(-n // self.team.size) if self.model.gradient is not None else len(numbers)
        for start in range(0, most, self.model.micro_batch):
            chunk = numbers[start : start + self.model.micro_batch]
            with self._agreed():
                tokens = self.draw(part, domain, chunk if len(chunk) else np.array([split * n]))
                if self.ballot.late():
                    raise TimeoutError("the probe ran past probe.time_limit; raise it or lower probe.samples")
            yield tokens, len(chunk) / n

    def _gradient(self, tokens, at):
        with self._agreed():
            return hvp.gradient(self._loss(tokens), at)

    def _loss(self, tokens):
        return lambda params: self.model.loss(params, tokens)

    def _agreed(self):
        """Ranks that hold one model must leave the micro-batch loop together, or one waits in a forward pass alone."""
        return reduce.agreed(self.holders)


class Full(_Replicate):
    """All g_k and h_k on this rank: 2 K vectors."""

    def __init__(self, *args):
        super().__init__(*args)
        self.g, self.h = ([_zeros(self.params) for _ in self.weights] for _ in range(2))

    def _products(self, split, step, out):
        with self.ballot.section("Hessian-vector products"):
            if split is not None:
                for vector in (*self.g, *self.h):
                    torch._foreach_zero_(vector)
                self._sweep(split, step, self._take, range(len(self.weights)))
        self.ballot.settle()
        if split is not None:
            for vector in self.g:
                reduce.sum_of_vectors(vector, self.adders)
            with self.ballot.section("contractions"):
                self._contract(step, out)

    def _take(self, k, vector, to_g, to_h):
        for into, scale in ((self.g[k], to_g), (self.h[k], to_h)):
            if scale:
                _add(into, vector, scale)

    def _contract(self, step, out):
        """Inner products over the parameters this rank counts. g is the team's, h this rank's share, so M sums up; of
        models whose vectors are shards both are what this rank holds of the team's."""
        out[:-4] = _gram(self.h, self.g, self.metric, self.once)
        out[-2] = _gram([self.params], self.h, None, self.decaying)
        if self.team.rank == 0 or self.model.together:
            out[-4] = _gram([self.u], self.g, None, self.once)
            out[-3] = _gram([self.u], self.g, None, self.decaying)
        self._note_step(step, out)


class Sharded(_Replicate):
    """The team's g_k and h_k once among its R ranks: each domain is added up whole, then every rank keeps a range of it."""

    def __init__(self, *args):
        super().__init__(*args)
        sizes = [p.numel() for p in self.params]
        length = -(-sum(sizes) // self.team.size)
        begin, starts = length * self.team.rank, np.cumsum([0, *sizes[:-1]])
        self.spans = [
            (min(max(begin - start, 0), size), min(max(begin + length - start, 0), size))
            for start, size in zip(starts.tolist(), sizes, strict=True)
        ]
        dtype = max((p.dtype for p in self.params), key=lambda kind: torch.finfo(kind).bits)
        zeros = self.params[0].new_zeros
        whole = length * self.team.size
        # difference: one sum gives g and h; exact: one each
        self.flat = [zeros(whole, dtype=dtype) for _ in range(1 if self.signs[0] else 2)]
        self.sums = [
            [v.view_as(p) for v, p in zip(flat[: sum(sizes)].split(sizes), self.params, strict=True)]
            for flat in self.flat
        ]
        self.g, self.h = (zeros((len(self.weights), length), dtype=dtype) for _ in range(2))

    def _products(self, split, step, out):
        self.g.zero_()
        self.h.zero_()
        for sign in self.signs:
            at = None
            with self.ballot.section("displacement"):
                if split is not None:
                    at = self._displaced(sign, step)
            for k in range(len(self.weights)):
                with self.ballot.section("Hessian-vector products"):
                    for flat in self.flat if split is not None else ():
                        flat.zero_()
                    if split is not None:
                        self._visit(k, split, step, sign, at, self._take)
                self.ballot.settle()
                if split is not None:
                    self._keep(k, sign, step)
            del at
        if split is not None:
            with self.ballot.section("contractions"):
                self._contract(step, out)

    def _take(self, k, vector, to_g, to_h):
        _add(self.sums[0 if to_g else 1], vector, to_g or to_h)

    def _keep(self, k, sign, step):
        """This rank's range of the team's sums: of g itself, and of h or, at theta +- eps u, of +-eps h."""
        pieces = [reduce.scattered_sum(flat, self.team.group) for flat in self.flat]
        self.g[k].add_(pieces[0])
        self.h[k].add_(pieces[-1], alpha=sign / step if sign else 1.0)

    def _contract(self, step, out):
        """Inner products over this rank's range of the parameters it counts."""
        sizes = [stop - start for start, stop in self.spans]
        g, h = ([row[: sum(sizes)].split(sizes) for row in rows] for rows in (self.g, self.h))
        u, params = self._range(self.u), self._range(self.params)
        out[:-4] = _gram(h, g, None if self.metric is None else self._range(self.metric), self.once)
        out[-4] = _gram([u], g, None, self.once)
        out[-3] = _gram([u], g, None, self.decaying)
        out[-2] = _gram([params], h, None, self.decaying)
        self._note_step(step, out)

    def _range(self, vector):
        pairs = zip(vector, self.spans, strict=True)
        return [v.detach().reshape(-1)[start:stop] for v, (start, stop) in pairs]


class Scores(_Replicate):
    """s_k = sum_j w_j P_kj = h_w . D g_k - h_k . D g_w with g_w = sum_j w_j g_j and h_w = sum_j w_j h_j, in two passes.

    The first pass adds up g_w and h_w, the second takes every gradient again and keeps numbers alone. Both see the same
    samples, so the terms w_k (h_k . D g_k) of the two products cancel as they do in P_kk = 0; with samples of its own
    for the mixture their noise would stay, many times the size of s.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.g, self.h = _zeros(self.params), _zeros(self.params)

    @staticmethod
    def rows(domains):
        """Rows of the table: s and the four others."""
        return 5

    def _products(self, split, step, out):
        with self.ballot.section("products of the mixture"):
            torch._foreach_zero_([*self.g, *self.h])
            if split is not None:
                self._sweep(split, step, self._mix, np.flatnonzero(self.weights).tolist())
        self.ballot.settle()
        if split is not None:
            for vector in (self.g, self.h):
                reduce.sum_of_vectors(vector, self.adders)
        with self.ballot.section("scores"):
            if split is not None:
                if self.metric is not None:
                    torch._foreach_mul_([*self.g, *self.h], [*self.metric, *self.metric])
                everyone = range(len(self.weights))
                self._sweep(split, step, lambda *found: self._score(out, *found), everyone)
                self._note_step(step, out)
        self.ballot.settle()

    def _mix(self, k, vector, to_g, to_h):
        for into, scale in ((self.g, to_g), (self.h, to_h)):
            if scale:
                _add(into, vector, scale * float(self.weights[k]))

    def _score(self, out, k, vector, to_g, to_h):
        """Add what one gradient or product gives to column k; g and h are the mixture's, times D."""
        decaying = _gram([vector], [self.h, self.g, self.u, self.params], None, self.decaying)[0]
        others = [i for i in self.once if i not in self.decaying]
        along_h, along_g, along_u = decaying[:3] + _gram([vector], [self.h, self.g, self.u], None, others)[0]
        out[0, k] += to_g * along_h - to_h * along_g
        out[-4, k] += to_g * along_u
        out[-3, k] += to_g * decaying[2]
        out[-2, k] += to_h * decaying[3]


def way(memory):
    """The class that works in a mode of probe.memory; "auto" stands for full until somebody has chosen."""
    return {"sharded": Sharded, "scores": Scores}.get(memory, Full)


def _zeros(params):
    return [torch.zeros_like(p) for p in params]


def _add(into, vector, scale):
    torch._foreach_add_(into, [v.to(i.dtype) for i, v in zip(into, vector, strict=True)], alpha=scale)


def _gram(X, Y, metric, indices):
    """Inner products over the tensors `indices`, float64 numpy [len(X), len(Y)]; zeros where there are none."""
    if not indices:
        return np.zeros((len(X), len(Y)))
    X, Y = ([[v[i] for i in indices] for v in vectors] for vectors in (X, Y))
    return ops.gram(X, Y, None if metric is None else [metric[i] for i in indices]).cpu().numpy()


def _dot(a, b, indices):
    return float(_gram([a], [b], None, indices)[0, 0])
