"""A small quadratic model of K domains learned from recycled Hessian-vector products (RH-Nys).

An orthonormal basis V grows by directions that are multiplied by the Hessian of each domain, K
products each, and by the steps of training themselves, along which exact gradients tell the
products for nothing. On V the Hessians are then known (Galerkin); on the strongest part of what the
products leave V into they are completed by Nystrom, which is exact on V and never negative. Vectors
may be anything: all that is asked of them is an inner product and a linear combination, so the same
lines serve numpy rows and lists of tensors of model size.

Source of the completion: Nystrom approximation (Williams & Seeger 2001). Cost of one `add`: K
products (by the caller) and (K + 1)^2 r inner products; memory: r (K + 1) vectors.
"""

import dataclasses

import numpy as np

from megatron_commute.experiments import receding_plan

WIDTH, COMPLETED = 24, 12  # most basis vectors; most coordinates of the completion
SILENT = 1e-7  # relative noise below which products count as exact
SMALL_STEP = 1e-5  # part of a step outside the basis from which its gradients tell products
LEFT_OUT = 6  # newest basis vectors that the leaner model does without


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What the products say in r coordinates, at the parameters of now. K domains."""

    full: receding_plan.Quadratic
    # from all products
    lean: receding_plan.Quadratic
    # without the newest LEFT_OUT of them, in other coordinates: how much those still missing matter
    H_se: np.ndarray
    # f64[K, r, r], standard errors of full.H, zero where exact
    g_se: np.ndarray
    # f64[K, r], likewise of full.g
    clock: np.ndarray
    # f64[P + 1], flow time from now to the ends of P equal parts of the samples left: 0 and the
    # whole for one rate

    @property
    def noisy(self):
        """Whether anything was measured with an error."""
        return bool((self.H_se > 0).any() or (self.g_se > 0).any())

    def draws(self, quadratic, count):
        """`quadratic` as it would be measured again, `count` times, as one Quadratic with a new
        leading axis; the same at every call.
        """
        rng = np.random.default_rng(0)
        noise = np.tril(rng.standard_normal((count, *self.H_se.shape)))
        noise = noise + np.tril(noise, -1).swapaxes(-1, -2)
        g = quadratic.g + self.g_se * rng.standard_normal((count, *self.g_se.shape))
        target = np.broadcast_to(quadratic.target, (count, *quadratic.target.shape))
        return receding_plan.Quadratic(H=quadratic.H + self.H_se * noise, g=g, target=target)


def rows_dots(X, Y):
    """Inner products f64[len(X), len(Y)] of lists of numpy vectors."""
    return np.array(X) @ np.array(Y).T


def rows_combine(coefficients, X):
    """sum_i coefficients[i] X[i] of numpy vectors."""
    return np.asarray(coefficients) @ np.array(X)


class Recycled:
    """The basis, its products and their Gram matrix. K = domains.

    Under a metric D pass vectors in its geometry (D^1/2 g, D^1/2 H D^1/2 v).
    """

    def __init__(self, domains, *, width=WIDTH, completed=COMPLETED):
        self.K, self.width, self.completed = domains, width, completed
        self.basis, self.products, self._gram = [], [], np.zeros((0, 0))

    def direction(self, gradients, shares):
        """The unit vector to multiply next: the strongest part outside the basis of the gradients
        and of the mixed Hessian's last products; None when nothing is left outside it.

        gradients: K vectors; shares f64[K].
        """
        recent = [rows_combine(shares, products) for products in self.products[-self.K :]]
        candidates = [*gradients, *recent]
        size = rows_dots(candidates, candidates)
        inside = rows_dots(self.basis, candidates) if self.basis else np.zeros((0, len(candidates)))
        outside = size - inside.T @ inside
        scale = np.sqrt(np.maximum(np.diag(size), 1e-300))
        values, vectors = np.linalg.eigh(outside)
        if values[-1] <= 1e-12 * scale.max() ** 2:
            return None
        found = rows_combine(vectors[:, -1], candidates)
        return self._orthonormal(found)

    def _orthonormal(self, vector):
        for _ in range(2):
            if self.basis:
                along = rows_dots(self.basis, [vector])[:, 0]
                vector = rows_combine([1.0, *-along], [vector, *self.basis])
            vector = rows_combine([float(rows_dots([vector], [vector])[0, 0]) ** -0.5], [vector])
        return vector

    def add(self, direction, products):
        """Keep a unit direction orthogonal to the basis (from `direction`) and its K products;
        beyond `width` the combination of least curvature goes, since order matters by curvature
        alone.
        """
        new = [direction, *products]
        old = [vector for v, y in zip(self.basis, self.products, strict=True) for vector in (v, *y)]
        corner = rows_dots(new, new)
        side = rows_dots(old, new) if old else np.zeros((0, len(new)))
        self._gram = np.block([[self._gram, side], [side.T, corner]])
        self.basis.append(direction)
        self.products.append(list(products))
        if len(self.basis) > self.width:
            self._forget()

    def _forget(self):
        """Turn the basis (Householder) so that its last vector is the one of least curvature, and
        drop that.
        """
        r, K = len(self.basis), self.K
        gram = self._gram.reshape(r, K + 1, r, K + 1)
        least = np.linalg.eigh(np.einsum("ikjk->ij", gram[:, 1:, :, 1:]))[1][:, 0]
        axis = least * (-1.0 if least[-1] > 0 else 1.0)
        axis[-1] -= 1.0
        axis /= np.linalg.norm(axis)
        columns = [self.basis, *([y[k] for y in self.products] for k in range(K))]
        turned = []
        for column in columns:
            along = rows_combine(axis, column)
            turned.append(
                [rows_combine([1.0, -2 * a], [x, along]) for a, x in zip(axis[:-1], column, strict=False)]
            )
        self.basis, self.products = turned[0], [list(y) for y in zip(*turned[1:], strict=True)]
        Q = (np.eye(r) - 2 * np.outer(axis, axis))[:, :-1]
        gram = np.einsum("ia,ikjl,jb->akbl", Q, gram, Q, optimize=True)
        self._gram = gram.reshape((r - 1) * (K + 1), (r - 1) * (K + 1))

    def follow(self, step, changes):
        """Learn from a step of training: H_k step is the `changes` of the gradients over it, K
        vectors (exactly on quadratics). Costs no product; for gradients without noise only, since
        it divides by what is new of the step.
        """
        along = rows_dots(self.basis, [step])[:, 0] if self.basis else np.zeros(0)
        length = float(rows_dots([step], [step])[0, 0]) ** 0.5
        outside = rows_combine([1.0, *-along], [step, *self.basis])
        size = float(rows_dots([outside], [outside])[0, 0]) ** 0.5
        if size <= SMALL_STEP * length:
            return
        known = zip(*self.products, strict=True) if self.products else ([] for _ in range(self.K))
        products = [
            rows_combine([1 / size, *-along / size], [change, *old])
            for change, old in zip(changes, known, strict=True)
        ]
        self.add(rows_combine([1 / size], [outside]), products)

    def blocks(self, without=0):
        """(a f64[K, r, r] with a[k, i, j] = v_i . H_k v_j, products' Gram f64[K, r, K, r]);
        without: newest left out.
        """
        r, K = len(self.basis), self.K
        gram = self._gram.reshape(r, K + 1, r, K + 1)[: r - without, :, : r - without]
        return gram[:, 0, :, 1:].transpose(2, 0, 1), gram[:, 1:, :, 1:].transpose(1, 0, 3, 2)

    def noise(self):
        """Relative error f64[K] of a product along any one direction: from V'HV, which would be
        symmetric without noise.
        """
        a, gram = self.blocks()
        r = len(self.basis)
        if r < 2:
            return np.zeros(self.K)
        norms = np.einsum("kjkj->kj", gram)
        upper = np.triu_indices(r, 1)
        apart = ((a - a.swapaxes(1, 2)) ** 2)[:, upper[0], upper[1]].sum(1)
        return np.sqrt(apart / np.maximum((norms[:, upper[0]] + norms[:, upper[1]]).sum(1), 1e-300))

    def model(self, gradients, target, clock, g_se=None):
        """The Model at the point where the K `gradients` were measured; target f64[K]; clock as in
        Model.

        g_se f64[K]: standard error of a gradient along any one direction (None: exact). Curvature
        is that of the points where the products were measured. ValueError before the first `add`.
        """
        if not self.basis:
            raise ValueError("no product yet: add one direction with its K products first")
        target, r, K = np.asarray(target, dtype=np.float64), len(self.basis), self.K
        every = [vector for v, y in zip(self.basis, self.products, strict=True) for vector in (v, *y)]
        dots = rows_dots(every, gradients).reshape(r, K + 1, K)
        full, error = self._completed(dots, target, r)
        lean, _ = self._completed(dots, target, max(r - LEFT_OUT, 1))
        H_se = np.zeros_like(full.H)
        H_se[:, :r, :r] = error
        slope = np.zeros(K) if g_se is None else np.asarray(g_se, dtype=np.float64)
        return Model(
            full=full,
            lean=lean,
            H_se=H_se,
            g_se=np.repeat(slope[:, None], full.g.shape[1], 1),
            clock=np.asarray(clock, dtype=np.float64),
        )

    def _completed(self, dots, target, r):
        """(Quadratic learned from the r oldest products, standard errors f64[K, r, r] of its
        measured block).
        """
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
        return receding_plan.Quadratic(H=H, g=g, target=target), error

    def _measured(self, a, norms):
        """(V'HV f64[K, r, r] of both readings weighted by their precision, never negative; its
        standard errors).
        """
        noise = self.noise()
        noise = np.where(noise > SILENT, noise, 0.0)[:, None, None]
        sure = 1 / np.maximum(norms, 1e-300)  # the error of a product grows with its length
        both = sure[:, None, :] + sure[:, :, None]
        A = (a * sure[:, None, :] + a.swapaxes(1, 2) * sure[:, :, None]) / both
        values, vectors = np.linalg.eigh(A)
        A = (vectors * np.maximum(values, 0.0)[:, None, :]) @ vectors.swapaxes(1, 2)
        return (A + A.swapaxes(1, 2)) / 2, noise / np.sqrt(both)
