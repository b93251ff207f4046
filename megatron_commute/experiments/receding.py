"""A small quadratic model of K domains learned from recycled Hessian-vector products (RH-Nys).

An orthonormal basis V grows by directions that are multiplied by the Hessian of each domain, K products each, and by the
steps of training themselves, along which exact gradients tell the products for nothing. On V the Hessians are then known
(Galerkin); on the strongest part of what the products leave V into they are completed by Nystrom, which is exact on V and
never negative. Vectors may be anything: all that is asked of them is an inner product and a linear combination, so the same
lines serve numpy rows and lists of tensors of model size.

Source of the completion: Nystrom approximation (Williams & Seeger 2001). Cost of one `add`: K products (by the caller) and
(K + 1)^2 r inner products; memory: r (K + 1) vectors.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from megatron_commute.experiments import receding_plan

WIDTH, COMPLETED = 24, 12  # most basis vectors; most coordinates of the completion
SILENT = 1e-7  # relative noise below which products count as exact
SMALL_STEP = 1e-5  # part of a step outside the basis from which its gradients tell products
LEFT_OUT = 6  # newest basis vectors that the leaner model does without
MOST_PIECES = 32  # of a plan: windows of equal length while they are few, then growing
ROUNDS = 240, 20  # of descent: of the first plan, and of one that goes on from the last
# part of the disagreement with the leaner model that is an error, without and with noise
DISAGREEMENT = 0.25, 0.5
OPTIMISM = 0.25  # part of what the leaner model's plan loses in the fuller one that is an error
STEPS = (1.0, 0.7, 0.4, 0.2, 0.1)  # parts of the planned deviation that are weighed against each other
DRAWS = 4  # models as they would be measured again, where there is noise
AGAIN = 60, 8  # rounds of descent on each: of the first plan, and of one that goes on


@dataclasses.dataclass(frozen=True)
class Model:
    """What the products say in r coordinates, at the parameters of now. K domains.

    full: the receding_plan.Quadratic; lean: the same learned without the newest LEFT_OUT products (other coordinates), whose
    disagreement says how much the products that are still missing matter. H_se f64[K, r, r], g_se f64[K, r]: standard errors
    of full.H and full.g, zero where exact. clock f64[P + 1]: flow time from now to the ends of P equal parts of the samples
    left (two numbers, 0 and the whole, for a constant learning rate).
    """

    full: receding_plan.Quadratic
    lean: receding_plan.Quadratic
    H_se: np.ndarray
    g_se: np.ndarray
    clock: np.ndarray

    @property
    def noisy(self):
        """Whether anything was measured with an error."""
        return bool((self.H_se > 0).any() or (self.g_se > 0).any())

    def draws(self, quadratic, count):
        """`quadratic` as it would be measured again, `count` times, as one Quadratic with a new leading axis; the same at
        every call."""
        rng = np.random.default_rng(0)
        noise = np.tril(rng.standard_normal((count, *self.H_se.shape)))
        noise = noise + np.tril(noise, -1).swapaxes(-1, -2)
        g = quadratic.g + self.g_se * rng.standard_normal((count, *self.g_se.shape))
        target = np.broadcast_to(quadratic.target, (count, *quadratic.target.shape))
        return receding_plan.Quadratic(quadratic.H + self.H_se * noise, g, target)


class Proposal(NamedTuple):
    """wish f64[K] for the coming window, the shares where not active; expected, error: change of the target loss at the end
    against the shares, and its standard error; constant: its change under the shares from now on; plan f64[M, K], pace: for
    the next call."""

    wish: np.ndarray
    active: bool
    expected: float
    error: float
    constant: float
    plan: np.ndarray
    pace: np.ndarray


def rows_dots(X, Y):
    """Inner products f64[len(X), len(Y)] of lists of numpy vectors."""
    return np.array(X) @ np.array(Y).T


def rows_combine(coefficients, X):
    """sum_i coefficients[i] X[i] of numpy vectors."""
    return np.asarray(coefficients) @ np.array(X)


class Recycled:
    """The basis, its products and their Gram matrix. K = domains.

    dots(X, Y) -> f64[len(X), len(Y)] and combine(c f64[m], X) -> vector act on lists of vectors; under a metric D pass
    vectors in its geometry (D^1/2 g, D^1/2 H D^1/2 v).
    """

    def __init__(self, domains, dots=rows_dots, combine=rows_combine, width=WIDTH, completed=COMPLETED):
        self.K, self.dots, self.combine, self.width, self.completed = domains, dots, combine, width, completed
        self.basis, self.products, self._gram = [], [], np.zeros((0, 0))

    def direction(self, gradients, shares):
        """The unit vector to multiply next: the strongest part outside the basis of the gradients and of the mixed Hessian's
        last products; None when nothing is left outside it.

        gradients: K vectors; shares f64[K].
        """
        recent = [self.combine(shares, products) for products in self.products[-self.K :]]
        candidates = [*gradients, *recent]
        size = self.dots(candidates, candidates)
        inside = self.dots(self.basis, candidates) if self.basis else np.zeros((0, len(candidates)))
        outside = size - inside.T @ inside
        scale = np.sqrt(np.maximum(np.diag(size), 1e-300))
        values, vectors = np.linalg.eigh(outside)
        if values[-1] <= 1e-12 * scale.max() ** 2:
            return None
        found = self.combine(vectors[:, -1], candidates)
        return self._orthonormal(found)

    def _orthonormal(self, vector):
        for _ in range(2):
            if self.basis:
                along = self.dots(self.basis, [vector])[:, 0]
                vector = self.combine([1.0, *-along], [vector, *self.basis])
            vector = self.combine([float(self.dots([vector], [vector])[0, 0]) ** -0.5], [vector])
        return vector

    def add(self, direction, products):
        """Keep a unit direction orthogonal to the basis (from `direction`) and its K products; beyond `width` the
        combination of least curvature goes, since order matters by curvature alone."""
        new = [direction, *products]
        old = [vector for v, y in zip(self.basis, self.products, strict=True) for vector in (v, *y)]
        corner = self.dots(new, new)
        side = self.dots(old, new) if old else np.zeros((0, len(new)))
        self._gram = np.block([[self._gram, side], [side.T, corner]])
        self.basis.append(direction)
        self.products.append(list(products))
        if len(self.basis) > self.width:
            self._forget()

    def _forget(self):
        """Turn the basis (Householder) so that its last vector is the one of least curvature, and drop that."""
        r, K = len(self.basis), self.K
        gram = self._gram.reshape(r, K + 1, r, K + 1)
        least = np.linalg.eigh(np.einsum("ikjk->ij", gram[:, 1:, :, 1:]))[1][:, 0]
        axis = least * (-1.0 if least[-1] > 0 else 1.0)
        axis[-1] -= 1.0
        axis /= np.linalg.norm(axis)
        columns = [self.basis, *([y[k] for y in self.products] for k in range(K))]
        turned = []
        for column in columns:
            along = self.combine(axis, column)
            turned.append(
                [self.combine([1.0, -2 * a], [x, along]) for a, x in zip(axis[:-1], column, strict=False)]
            )
        self.basis, self.products = turned[0], [list(y) for y in zip(*turned[1:], strict=True)]
        Q = (np.eye(r) - 2 * np.outer(axis, axis))[:, :-1]
        gram = np.einsum("ia,ikjl,jb->akbl", Q, gram, Q, optimize=True)
        self._gram = gram.reshape((r - 1) * (K + 1), (r - 1) * (K + 1))

    def follow(self, step, changes):
        """Learn from a step of training: H_k step is the `changes` of the gradients over it, K vectors (exactly on
        quadratics). Costs no product; for gradients without noise only, since it divides by what is new of the step."""
        along = self.dots(self.basis, [step])[:, 0] if self.basis else np.zeros(0)
        length = float(self.dots([step], [step])[0, 0]) ** 0.5
        outside = self.combine([1.0, *-along], [step, *self.basis])
        size = float(self.dots([outside], [outside])[0, 0]) ** 0.5
        if size <= SMALL_STEP * length:
            return
        known = zip(*self.products, strict=True) if self.products else ([] for _ in range(self.K))
        products = [
            self.combine([1 / size, *-along / size], [change, *old])
            for change, old in zip(changes, known, strict=True)
        ]
        self.add(self.combine([1 / size], [outside]), products)

    def blocks(self, without=0):
        """(a f64[K, r, r] with a[k, i, j] = v_i . H_k v_j, products' Gram f64[K, r, K, r]); without: newest left out."""
        r, K = len(self.basis), self.K
        gram = self._gram.reshape(r, K + 1, r, K + 1)[: r - without, :, : r - without]
        return gram[:, 0, :, 1:].transpose(2, 0, 1), gram[:, 1:, :, 1:].transpose(1, 0, 3, 2)

    def noise(self):
        """Relative error f64[K] of a product along any one direction: from V'HV, which would be symmetric without noise."""
        a, gram = self.blocks()
        r = len(self.basis)
        if r < 2:
            return np.zeros(self.K)
        norms = np.einsum("kjkj->kj", gram)
        upper = np.triu_indices(r, 1)
        apart = ((a - a.swapaxes(1, 2)) ** 2)[:, upper[0], upper[1]].sum(1)
        return np.sqrt(apart / np.maximum((norms[:, upper[0]] + norms[:, upper[1]]).sum(1), 1e-300))

    def model(self, gradients, target, clock, g_se=None):
        """The Model at the point where the K `gradients` were measured; target f64[K]; clock as in Model.

        g_se f64[K]: standard error of a gradient along any one direction (None: exact). Curvature is that of the points
        where the products were measured. ValueError before the first `add`.
        """
        if not self.basis:
            raise ValueError("no product yet: add one direction with its K products first")
        target, r, K = np.asarray(target, dtype=np.float64), len(self.basis), self.K
        every = [vector for v, y in zip(self.basis, self.products, strict=True) for vector in (v, *y)]
        dots = self.dots(every, gradients).reshape(r, K + 1, K)
        full, error = self._completed(dots, target, r)
        lean, _ = self._completed(dots, target, max(r - LEFT_OUT, 1))
        H_se = np.zeros_like(full.H)
        H_se[:, :r, :r] = error
        slope = np.zeros(K) if g_se is None else np.asarray(g_se, dtype=np.float64)
        return Model(
            full,
            lean,
            H_se,
            np.repeat(slope[:, None], full.g.shape[1], 1),
            np.asarray(clock, dtype=np.float64),
        )

    def _completed(self, dots, target, r):
        """(Quadratic learned from the r oldest products, standard errors f64[K, r, r] of its measured block)."""
        a, gram = self.blocks(len(self.basis) - r)
        K, inside = self.K, a.transpose(1, 0, 2).reshape(r, self.K * r)
        A, error = self._measured(a, np.einsum("kjkj->kj", gram))
        values, vectors = np.linalg.eigh(A)
        outside = gram.reshape(K * r, K * r) - inside.T @ inside
        strength, U = np.linalg.eigh(outside)
        take = np.flatnonzero(strength > 1e-10 * max(strength[-1], 1e-6 * float(np.einsum("kjkj->", gram))))
        take = take[-self.completed :] if self.completed else take[:0]
        strength, U = strength[take], U[:, take]
        B = (np.sqrt(strength)[:, None] * U.T).reshape(-1, K, r).swapaxes(0, 1)  # [K, q, r]
        inverse = np.where(values > 1e-3 * values[:, -1:], 1 / np.maximum(values, 1e-300), 0.0)
        along = B @ vectors
        D = (along * inverse[:, None, :]) @ along.swapaxes(1, 2) + values[:, :1, None] * np.eye(len(take))
        H = np.concatenate([np.concatenate([A, B.swapaxes(1, 2)], 2), np.concatenate([B, D], 2)], 1)
        on_rest = dots[:r, 1:].transpose(1, 0, 2).reshape(K * r, K) - inside.T @ dots[:r, 0]
        g = np.concatenate([dots[:r, 0], (U / np.sqrt(strength)).T @ on_rest]).T
        return receding_plan.Quadratic(H, g, target), error

    def _measured(self, a, norms):
        """(V'HV f64[K, r, r] of both readings weighted by their precision, never negative; its standard errors)."""
        noise = self.noise()
        noise = np.where(noise > SILENT, noise, 0.0)[:, None, None]
        sure = 1 / np.maximum(norms, 1e-300)  # the error of a product grows with its length
        both = sure[:, None, :] + sure[:, :, None]
        A = (a * sure[:, None, :] + a.swapaxes(1, 2) * sure[:, :, None]) / both
        values, vectors = np.linalg.eigh(A)
        A = (vectors * np.maximum(values, 0.0)[:, None, :]) @ vectors.swapaxes(1, 2)
        return (A + A.swapaxes(1, 2)) / 2, noise / np.sqrt(both)


def segments(samples_left, window, clock):
    """(times f64[M], sizes f64[M]) of the rest of a run: the coming window first, then equal or growing pieces."""
    count = -(-samples_left // window)
    if count <= MOST_PIECES:
        sizes = np.full(int(count), float(window))
        sizes[-1] = samples_left - sizes[:-1].sum()
    else:
        low, high = 1.0, 2.0
        for _ in range(60):  # the ratio at which MOST_PIECES growing pieces fill the run
            ratio = (low + high) / 2
            low, high = (
                (ratio, high)
                if window * (ratio**MOST_PIECES - 1) / (ratio - 1) < samples_left
                else (low, ratio)
            )
        sizes = window * ratio ** np.arange(MOST_PIECES)
        sizes *= samples_left / sizes.sum()
    ends = np.concatenate([[0.0], np.cumsum(sizes)]) / samples_left
    return np.diff(np.interp(ends, np.linspace(0, 1, len(clock)), clock)), sizes


def target_last(rest, sizes, target):
    """Schedule f64[M, K]: excess budgets first, then the target's mixture for as long as the budgets carry it."""
    share = np.where(target > 0, target, 1.0)
    tail = np.where(target > 0, rest / share, np.inf).min()
    first = np.maximum(sizes.sum() - tail, 1e-9 * sizes.sum())
    early = np.clip((first - (np.cumsum(sizes) - sizes)) / sizes, 0, 1)[:, None]
    excess = np.maximum(rest - (sizes.sum() - first) * target, 0.0)
    return early * (excess / first) + (1 - early) * target


def gains(quadratic, times, base, plan):
    """(loss under base f64[M, K] - loss with the parts STEPS of what `plan` f64[..., M, K] deviates from it) f64[..., S]."""
    tried = base + np.reshape(STEPS, (-1, 1, 1)) * (plan - base)[..., None, :, :]
    return receding_plan.loss_change(quadratic, base, times) - receding_plan.loss_change(
        quadratic, tried, times
    )


def propose(model, times, sizes, rest, start=None, pace=None):
    """The Proposal for the coming window: plan the rest of the run on the small model, apply no more of it than is sure.

    times f64[M], sizes f64[M] as from `segments`, rest f64[K] samples left of every domain (their sum is that of sizes);
    start f64[M, K], pace: the last plan for the windows that remain. The step is the part of a plan's deviation from the
    shares with the largest gain minus two errors.
    """
    shares = rest / rest.sum()
    base = np.tile(shares, (len(sizes), 1))
    begin, goes_on = base, start is not None
    if goes_on:
        begin = receding_plan.spread(np.maximum(0.98 * start + 0.02 * base, 1e-6), sizes, rest)
    run = times, sizes, rest
    if model.noisy:
        plan, claims = noisy_claims(model, run, base, begin, AGAIN[goes_on])
    else:
        plan, pace, claims = exact_claims(model, run, base, begin, ROUNDS[goes_on], pace)
    first, gain, error = (np.concatenate(column) for column in zip(*claims, strict=True))
    best = int(np.argmax(gain - 2 * error))
    active = bool(gain[best] > 2 * error[best])
    constant = float(receding_plan.loss_change(model.full, base, times))
    wish = first[best] if active else shares
    return Proposal(wish, active, -float(gain[best]), float(error[best]), constant, plan, pace)


def claim(plan, base, gain, *errors):
    """(first windows f64[S, K] of the STEPS from base towards plan, their gain f64[S], its error f64[S])."""
    first = base[0] + np.reshape(STEPS, (-1, 1)) * (plan[0] - base[0])
    return first, gain, np.sqrt(sum(error**2 for error in errors))


def exact_claims(model, run, base, begin, rounds, pace):
    """(plan f64[M, K], pace, its claim) of a model without noise.

    Errors: how far the leaner model disagrees about the plan, and what the leaner model's own best plan, chosen for its
    faults, loses when the fuller one judges it; a part of each counts, since the fuller one errs by less.
    """
    times, sizes, rest = run
    plan, _, pace = receding_plan.descend(model.full, begin, times, sizes, rest, rounds, pace)
    chosen, value, _ = receding_plan.descend(model.lean, begin, times, sizes, rest, rounds, pace)
    promised = receding_plan.loss_change(model.lean, base, times) - value
    bias = promised - gains(model.full, times, base, chosen)[0]
    gain = gains(model.full, times, base, plan)
    apart = gain - gains(model.lean, times, base, plan)
    return plan, pace, [claim(plan, base, gain, DISAGREEMENT[0] * apart, OPTIMISM * bias * np.array(STEPS))]


def noisy_claims(model, run, base, begin, rounds):
    """(plan f64[M, K], its claim and that of `target_last`) of a model that was measured with noise.

    A plan chosen freely on a noisy model is chosen for its noise, and harms. So the model is shrunk to what stands out of
    its noise; DRAWS models, as they would be measured and shrunk again if that were the truth, have a plan each, and what
    those keep of their gain in the truth tells what choosing is worth (parametric bootstrap). Their mean is the plan. The
    other is the target's own mixture at the end, which has nothing to choose: there the measurement counts as it is.
    """
    times, sizes, rest = run
    truth = receding_plan.shrunk(model.full, model.H_se, model.g_se)
    again = receding_plan.shrunk(model.draws(truth, DRAWS), model.H_se, model.g_se)
    found = receding_plan.descend(again, np.repeat(begin[None], DRAWS, 0), times, sizes, rest, rounds)[0]
    plan, kept = found.mean(0), gains(truth, times, base, found)
    apart = gains(truth, times, base, plan) - gains(model.lean, times, base, plan)
    chosen = claim(plan, base, kept.mean(0), kept.std(0, ddof=1), DISAGREEMENT[1] * apart)
    safe = target_last(rest, sizes, model.full.target)
    # no errors given: nothing is shrunk, only negative curvature is cut
    again = receding_plan.shrunk(model.draws(model.full, DRAWS), 0 * model.H_se, 0 * model.g_se)
    kept = receding_plan.loss_change(again, base, times) - receding_plan.loss_change(again, safe, times)
    gain = gains(model.full, times, base, safe)
    apart = gain - gains(model.lean, times, base, safe)
    errors = kept.std(ddof=1) * np.array(STEPS), DISAGREEMENT[1] * apart
    return plan, [chosen, claim(safe, base, gain, *errors)]
