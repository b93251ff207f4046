"""Where a run stands in its stream of samples: what training has consumed, and what feeds it
from ahead.

The sampler runs ahead of training by what data loaders prefetch, on a copy of the mixture. Both
are the same pure stream, so a change of weights must reach both at the same sample, or training
and its books would part.
"""

import numpy as np

from megatron_commute import reduce


class Stream:
    """The consumed mixture and the sampler's frontier behind one `schedule`; equal on all ranks.

    consumed: mixture.Mixture at the samples consumed. sampler: data.sampler.MixtureSampler, None
    where the host feeds training (mode shadow). groups: reduce.Groups. batches:
    settings.batches.Batches of the run.
    """

    def __init__(self, *, consumed, sampler, groups, batches):
        self.consumed, self.sampler, self.groups, self.batches = consumed, sampler, groups, batches

    @property
    def index(self):
        """Samples consumed."""
        return self.consumed.index

    @property
    def served(self):
        """Samples consumed of every domain, i64[K]."""
        return self.consumed.served

    @property
    def weights(self):
        """The weights f64[K] in force at the next sample."""
        return np.asarray(self.consumed.weights, dtype=np.float64)

    def take(self):
        """(domain, position) i64[samples of the step] of the coming step, and the projections that
        budgets asked for in it.
        """
        domains, positions = self.consumed.take(self.batches.size(self.consumed.index))
        projections = [change._asdict() for change in self.consumed.projections]
        self.consumed.projections.clear()
        return domains, positions, projections

    def ahead(self, sample):
        """A copy of the mixture at `sample`, or at the consumed samples where those are further."""
        mixture = self.consumed.copy()
        mixture.skip(max(0, sample - mixture.index))
        return mixture

    def schedule(self, changes):
        """Let weights f64[K] hold from a sample on, for each (sample, weights) of `changes`, in
        order; False, and nothing changed, where a loader of any rank is past the first.

        Collective.
        """
        late = self.sampler is not None and self.sampler.frontier.index > changes[0][0]
        if reduce.any_rank(late, self.groups.world):
            return False
        frontier = () if self.sampler is None else (self.sampler,)
        for mixture in (self.consumed, *frontier):
            for sample, weights in changes:
                mixture.schedule(weights, sample)
        return True
