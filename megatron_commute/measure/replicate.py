"""The work of a probe on one replicate: direction, step, gradients and products.

What is held of them and contracted is the business of replicate_ways. Parameters are read, never
written.
"""

import numpy as np
import torch

from megatron_commute import hvp, reduce
from megatron_commute.measure.keep import Keep
from megatron_commute.settings.probe_cost import direction_samples


class Replicate:
    """What the ways of replicate_ways share: one replicate at a time, in memory that is allocated
    once per probe.

    Rows of numbers[split, target], K columns: what `_products` measures, then u.g, u.g over decayed
    parameters, h.theta, and eps in the first column. `metric` is set before the first `run`.
    """

    def __init__(self, *, model, groups, team, draw, settings, params, weights, ballot, direction=None):
        self.model, self.groups, self.team, self.draw, self.settings = model, groups, team, draw, settings
        self.params, self.weights, self.ballot, self.metric = params, weights, ballot, None
        self.direction = direction
        self.signs = (1.0, -1.0) if settings.method == "difference" else (0.0,)
        self.once = [i for i, owned in enumerate(model.owned) if owned]
        self.decaying = [i for i in self.once if model.decayed[i]]
        # whose numbers make up those of one vector, and which ranks add vectors up: with shards the
        # model has done so
        self.holders = groups.world if model.together else groups.model
        self.adders = None if model.together else team.group
        self.keep = Keep(settings.offload)
        self.u = self.keep.zeros(params)

    @staticmethod
    def rows(domains):
        """Rows of the table: those of M and the four others."""
        return domains + 4

    def run(self, split, targets, numbers, checks):
        """Fill numbers[split] with this rank's share, which sums over all ranks; split: None for a
        rank without work. checks [targets, K, 6]: likewise, of `_check`, by the ranks that work on
        the first split.
        """
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
                self.keep.copy(self.u, hvp.finite(given, "the direction"))
        self.ballot.settle()

    def _gradient_of_target(self, split, target):
        """u = sum_k target_k g_k on this replicate's direction samples, summed over the team."""
        n = direction_samples(self.settings.samples, self.settings.splits)
        with self.ballot.section("direction"):
            torch._foreach_zero_(self.u)
            for k in np.flatnonzero(target).tolist() if split is not None else ():
                for vector, share in self._gradients("direction", k, split, n, self.params):
                    self.keep.add(self.u, vector, share * float(target[k]))
                    del vector
        self.ballot.settle()
        if split is not None:
            self.keep.sum_over(self.adders, self.u, self.params)

    def _displacement(self, split):
        """Turn the gradient into u = D g; the eps of the difference (global norms, equal on all
        model ranks).
        """
        step, squares = None, np.zeros(2)
        with self.ballot.section("displacement"):
            if split is not None:
                if self.metric is not None:
                    torch._foreach_mul_(self.u, self.metric)
                squares = np.array([self.keep.dot(v, v, self.once) for v in (self.u, self.params)])
        squares = reduce.sum_of_numbers(squares, self.holders)
        with self.ballot.section("displacement"):
            if split is not None:
                step = hvp.difference_step(self.params, self.u, v_square=squares[0], params_square=squares[1])
        self.ballot.settle()
        return step

    def _check(self, step, out):
        """For every domain u.H u and u.g of one sequence from gradients at +-eps; how far either is
        off at +-2 eps; that of each parameter tensor, squared and summed. Costs four gradients of
        one sequence a domain; where vectors are shards every rank takes the same one.
        """
        if self.team.rank and not self.model.together:
            return
        share = 1 / self.team.size if self.model.together else 1.0
        along = np.zeros((4, len(out), len(self.once)))
        with self.ballot.section("numerical error"):
            for i, scale in enumerate((1.0, -1.0, 2.0, -2.0)):
                at = self._displaced(scale, step)
                for k in range(len(out)):
                    with self._agreed():
                        tokens = self.draw("gradient", k, np.arange(1))
                    for vector, part in self._slopes(at, iter([(tokens, share)])):
                        along[i, k] = [part * self.keep.dot(self.u, vector, [j]) for j in self.once]
                        del vector
                del at
            near, far = (along[0] - along[1]) / (2 * step), (along[2] - along[3]) / (4 * step)
            for at, one, two in (0, near, far), (3, along[:2].mean(0), along[2:].mean(0)):
                out[:, at : at + 3].T[:] = one.sum(1), (one - two).sum(1), ((one - two) ** 2).sum(1)

    def _sweep(self, split, step, take, domains):
        """take(k, vector, to_g, to_h) for every gradient of `domains`: g_k = sum to_g vector, h_k =
        sum to_h vector.
        """
        for sign in self.signs:
            at = self._displaced(sign, step)
            for k in domains:
                self._visit(k, split, step, sign, at, take)
            del at  # before the other side is built

    def _displaced(self, sign, step):
        with self._agreed():
            return self.keep.displaced(self.params, self.u, sign * step) if sign else None

    def _visit(self, k, split, step, sign, at, take):
        """One domain's share of `_sweep`. Vectors are handed over without a name, so that two never
        live at once.
        """
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
        """(vector, share) of this rank's micro-batches at the tensors `at`; of all of them at once
        where the model asks.
        """
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
        """This rank's micro-batches of a replicate's n sequences, each with its share of the mean
        over the replicate.

        Models that run micro-batches together get as many on every rank of the team: some may be
        there for nothing.
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
        """Ranks that hold one model must leave the micro-batch loop together, or one waits in a
        forward pass alone.
        """
        return reduce.agreed(self.holders)
