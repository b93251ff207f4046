"""Two ways to hold and contract the gradients and products of a replicate, on whole vectors or on
shards of them.

They differ in what they hold (megatron_commute.settings.memory) and agree in their numbers: rows of
a table that is summed over all ranks. Parameters are read, never written.
"""

import numpy as np
import torch

from megatron_commute.measure.replicate import Replicate


class Full(Replicate):
    """All g_k and h_k, or this rank's shards of them: 2 K vectors."""

    def __init__(self, **given):
        super().__init__(**given)
        self.g, self.h = ([self.keep.zeros(self.params) for _ in self.weights] for _ in range(2))

    def _products(self, split, step, out):
        with self.ballot.section("Hessian-vector products"):
            if split is not None:
                for vector in (*self.g, *self.h):
                    torch._foreach_zero_(vector)
                self._sweep(split, step, self._take, range(len(self.weights)))
        self.ballot.settle()
        if split is not None:
            for vector in self.g:
                self.keep.sum_over(self.adders, vector, self.params)
            with self.ballot.section("contractions"):
                self._contract(step, out)

    def _take(self, k, vector, to_g, to_h):
        for into, scale in ((self.g[k], to_g), (self.h[k], to_h)):
            if scale:
                self.keep.add(into, vector, scale)

    def _contract(self, step, out):
        """Inner products over the parameters this rank counts. g is the team's, h this rank's
        share, so M sums up; of models whose vectors are shards both are what this rank holds of the
        team's.
        """
        out[:-4] = self.keep.gram(self.h, self.g, self.metric, self.once)
        out[-2] = self.keep.gram([self.params], self.h, None, self.decaying)
        if self.team.rank == 0 or self.model.together:
            out[-4] = self.keep.gram([self.u], self.g, None, self.once)
            out[-3] = self.keep.gram([self.u], self.g, None, self.decaying)
        self._note_step(step, out)


class Scores(Replicate):
    """s_k = sum_j w_j P_kj = h_w . D g_k - h_k . D g_w with g_w = sum_j w_j g_j and h_w = sum_j w_j
    h_j, in two passes.

    The first pass adds up g_w and h_w, the second takes every gradient again and keeps numbers
    alone. Both see the same samples, so the terms w_k (h_k . D g_k) of the two products cancel as
    they do in P_kk = 0; with samples of its own for the mixture their noise would stay, many times
    the size of s.
    """

    def __init__(self, **given):
        super().__init__(**given)
        self.g, self.h = self.keep.zeros(self.params), self.keep.zeros(self.params)

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
                self.keep.sum_over(self.adders, vector, self.params)
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
                self.keep.add(into, vector, scale * float(self.weights[k]))

    def _score(self, out, k, vector, to_g, to_h):
        """Add what a gradient or product gives to column k; g, h are the mixture's, times D."""
        decaying = self.keep.gram([vector], [self.h, self.g, self.u, self.params], None, self.decaying)[0]
        others = [i for i in self.once if i not in self.decaying]
        along_h, along_g, along_u = (
            decaying[:3] + self.keep.gram([vector], [self.h, self.g, self.u], None, others)[0]
        )
        out[0, k] += to_g * along_h - to_h * along_g
        out[-4, k] += to_g * along_u
        out[-3, k] += to_g * decaying[2]
        out[-2, k] += to_h * decaying[3]


def way(memory):
    """The class that works in a mode of probe.memory."""
    return Scores if memory == "scores" else Full
