"""A small run in place of a large one: everything is the same fraction of it, trained by an AdamW
that is written out. T steps, K domains, P parameters.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch

from megatron_commute.design.model import Model, Shape
from megatron_commute.design.text import Text
from megatron_commute.mixture import Mixture

BETWEEN = 5  # steps between parameters that are averaged
CLIP_EPSILON = 1e-6  # added to the norm, as Megatron and torch do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained."""

    rates: tuple
    # learning rate of each of the T steps
    weight_decay: float = 0.1
    # of matrices, decoupled
    clip: float = 1.0
    # greatest norm of a gradient; inf clips nothing
    betas: tuple = (0.9, 0.999)
    # of the two moments
    eps: float = 1e-8
    # added to the root of the second moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proxy:
    """A small run in place of a large one."""

    shape: Shape
    # of its model
    recipe: Recipe
    # of its training
    batch: int
    # sequences of a step
    shares: tuple
    # of the samples, by domain: those of the run
    epochs: tuple
    # how often each domain's text is repeated: as the run does
    kept: tuple = ()
    # tokens that are not folded, () for all

    @property
    def steps(self):
        return len(self.recipe.rates)

    @property
    def each(self):
        """Sequences of every domain in a step of a recorded run."""
        return max(1, self.batch // len(self.shares))

    @property
    def budgets(self):
        """Samples of each domain, in sum those of the run; rounding is left to the largest."""
        found = [round(share * self.steps * self.batch) for share in self.shares]
        found[int(np.argmax(self.shares))] += self.steps * self.batch - sum(found)
        return found


class State(NamedTuple):
    """What training depends on, each [P]: parameters and the two moments."""

    theta: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor

    def copy(self):
        return State(*(part.clone() for part in self))


class Stream:
    """Training sequences of every domain for one seed, reshuffled each time they are repeated.

    counts: samples of each domain that the run takes.
    """

    def __init__(self, *, proxy, text, seed, counts):
        self.orders, self.sequences = [], []
        for k, count in enumerate(counts):
            own = max(1, math.ceil(count / proxy.epochs[k]))
            generator = torch.Generator().manual_seed(10 * seed + k)
            rounds = [torch.randperm(own, generator=generator) for _ in range(math.ceil(count / own))]
            self.orders.append(torch.cat(rounds) if rounds else torch.zeros(0, dtype=torch.int64))
            self.sequences.append(text.drawn(k, own, seed))

    def take(self, k, first, count):
        """i64[count, t + 1]: the samples of domain k from number `first` on."""
        return self.sequences[k][self.orders[k][first : first + count]]


class Run:
    """A proxy under one seed. Deterministic: the same settings and seed give the same numbers.

    text: a Text, or None to be given `stream` (take(k, first, count) -> i64[count, t + 1]).
    """

    def __init__(self, *, proxy, seed, text=None, weighted=True, stream=None, dtype=torch.float32):
        self.proxy, self.seed, self.weighted = proxy, seed, weighted
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = Model(shape=proxy.shape, dtype=dtype, device=device)
        counts = [proxy.steps * proxy.each] * len(proxy.shares) if weighted else proxy.budgets
        self.stream = stream or Stream(proxy=proxy, text=text, seed=seed, counts=counts)

    def start(self):
        theta = self.model.initial(self.seed)
        return State(theta, torch.zeros_like(theta), torch.zeros_like(theta))

    def weighted_batch(self, step, weights):
        """(tokens, what each sequence's loss counts): as many of every domain, so that noise does
        not depend on weights f64[K].
        """
        n, K = self.proxy.each, len(weights)
        tokens = torch.cat([self.stream.take(k, step * n, n) for k in range(K)])
        scale = torch.from_numpy(np.repeat(np.asarray(weights, dtype=np.float64) / n, n))
        return tokens.to(self.model.device), scale.to(self.model.device, self.model.dtype)

    def clipping(self, gradient):
        """(factor that brings a gradient [P] to the greatest norm, its norm)."""
        norm = float(gradient.norm())
        return min(1.0, self.proxy.recipe.clip / (norm + CLIP_EPSILON)), norm

    def update(self, state, gradient, step):
        """One step of AdamW on a State, in place; gradient [P] before clipping, step from 0.

        FloatingPointError where the run has diverged.
        """
        recipe, (b1, b2), rate = self.proxy.recipe, self.proxy.recipe.betas, self.proxy.recipe.rates[step]
        factor, norm = self.clipping(gradient)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the proxy's gradient is not finite at step {step}: lower its rate with --proxy lr=..."
            )
        state.first.mul_(b1).add_(gradient, alpha=factor * (1 - b1))
        state.second.mul_(b2).addcmul_(gradient, gradient, value=factor * factor * (1 - b2))
        root = (state.second / (1 - b2 ** (step + 1))).sqrt_().add_(recipe.eps)
        if recipe.weight_decay:
            state.theta.mul_(1 - rate * recipe.weight_decay * self.model.decayed)
        state.theta.addcdiv_(state.first, root, value=-rate / (1 - b1 ** (step + 1)))

    def advance(self, state, weights, begin, end, tape=None):
        """Train a State from step `begin` to `end` under weights f64[T, K] that act on the loss.

        tape: a list that gets (theta before, first and second after, gradient) of every step.
        """
        for step in range(begin, end):
            tokens, scale = self.weighted_batch(step, weights[step])
            gradient, _ = self.model.gradient(state.theta, tokens, scale)
            before = state.theta.clone() if tape is not None else None
            self.update(state, gradient, step)
            if tape is not None:
                tape.append((before, state.first.clone(), state.second.clone(), gradient))
        return state

    def sampled(self, changes, averaged=0.0):
        """(final State of a run whose batches the product's own Mixture serves, budgets exact, mean
        parameters [P] of its last part `averaged`, None for 0).

        changes: [(sample, weights f64[K])].
        """
        proxy, state = self.proxy, self.start()
        mixture = Mixture(np.array(proxy.shares), proxy.budgets, samples=proxy.steps * proxy.batch)
        for sample, weights in changes:
            mixture.schedule(weights, sample)
        taken = np.zeros(len(proxy.shares), dtype=np.int64)
        first, mean, count = round((1 - averaged) * proxy.steps), None, 0
        scale = torch.full((proxy.batch,), 1 / proxy.batch, dtype=self.model.dtype, device=self.model.device)
        for step in range(proxy.steps):
            counts = np.bincount(mixture.take(proxy.batch)[0], minlength=len(taken))
            tokens = [self.stream.take(k, taken[k], n) for k, n in enumerate(counts) if n]
            taken += counts
            gradient, _ = self.model.gradient(state.theta, torch.cat(tokens).to(self.model.device), scale)
            self.update(state, gradient, step)
            if step >= first and (proxy.steps - 1 - step) % BETWEEN == 0:
                count += 1
                mean = state.theta.clone() if mean is None else mean.lerp_(state.theta, 1 / count)
        assert taken.tolist() == proxy.budgets
        return state, mean


def rates_of(run_rates, steps, peak):
    """Learning rates f64[steps] of a proxy: those of the run f64[N] at the same fractions, scaled
    to its own peak.
    """
    run_rates = np.asarray(run_rates, dtype=np.float64)
    at = (np.arange(steps) + 0.5) / steps
    found = np.interp(at, (np.arange(len(run_rates)) + 0.5) / len(run_rates), run_rates)
    return found * (peak / found.max())


def text_of(source, proxy):
    """The Text that a proxy reads."""
    shape = proxy.shape
    return Text(source=source, sequence=shape.sequence, vocabulary=shape.vocabulary, kept=proxy.kept)
