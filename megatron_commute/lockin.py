"""Lock-in: a small wave on the run's own weights, and what held-out losses say about it. Pure functions and one small
state.

One measurement is a cycle: `half` samples at the weights w + v, as many at w - v, then the rest of the cycle at w.
Budgets are given back within the cycle, and a loss read at its end is judged after a common tail. The signs of v
follow Walsh functions, a different one for each domain, so the domains' effects separate. A reading costs evaluations
only.
"""

import dataclasses

import numpy as np

KEPT = 24  # readings that an effect is fitted to at most
DROP = 1e-9  # a wave smaller than this is none


@dataclasses.dataclass(frozen=True)
class Effect:
    """value, se f64[T, K]: change of each target's loss, nats, per unit of weight moved onto domain k in the first
    half and given back in the second, relative to the mixture (sum_k w_k value_k = 0; negative: domain k earlier
    helps). dof of se.
    """

    value: np.ndarray
    se: np.ndarray
    dof: int


def walsh(n, K):
    """Signs f64[n, K] of n successive measurements, the k-th Walsh function of falling sequency for domain k.

    K = 2 needs one function and its opposite: +, -, +, ... Otherwise columns are orthogonal over every period of the
    least power of two above K and have mean zero there.
    """
    if K < 2:
        return np.zeros((n, K))
    if K == 2:
        return np.array([[1.0, -1.0]]) * (-1.0) ** np.arange(n)[:, None]
    period = 1 << K.bit_length()
    row, column = np.arange(period)[:, None], np.arange(period)
    parity = sum(((row >> bit) & (column >> bit)) & 1 for bit in range(K.bit_length()))
    hadamard = 1.0 - 2.0 * (parity % 2)
    changes = (np.diff(hadamard, axis=0) != 0).sum(0)
    chosen = np.argsort(-changes, kind="stable")[:K]
    return hadamard[np.arange(n) % period][:, chosen]


def wave(base, signs, delta, low, high):
    """The deviation v f64[K] from base f64[K] for signs f64[K]: w_k (sign_k - mean sign), so large that no weight
    moves by more than `delta` of itself and base + v, base - v stay within low and high f64[K]; zeros where that
    leaves nothing.
    """
    base, signs = np.asarray(base, dtype=np.float64), np.asarray(signs, dtype=np.float64)
    v = base * (signs - base @ signs)
    v -= base * v.sum()
    moved = np.abs(v) > DROP
    if not moved.any():
        return np.zeros_like(base)
    room = np.minimum(np.minimum(base - low, high - base), delta * base)[moved]
    return v * max(0.0, float((room / np.abs(v[moved])).min()))


def demodulate(losses, waves, weights, at=None, epoch=None):
    """The Effect on n held-out losses f64[n, T] (or f64[n]) read after cycles whose first halves moved the weights by
    waves f64[n, K] around `weights` f64[K].

    y_j = (2 L_j - L_{j-1} - L_{j+1}) / 4 removes the drift of training; with two domains and alternating signs s_j
    this is A = mean_j s_j y_j. Otherwise y is fitted by least squares to the waves under the same differences. The
    error is the spread over j, with what neighbouring differences share accounted for (for alternating signs 1.5 to
    1.7 times the naive one). at f64[n]: where the losses were read (default: evenly); epoch i64[n]: differences are
    taken inside an epoch only. None where the readings do not determine every effect and an error.

    Halves of one long square wave are the same thing: losses at the end of each half, waves = minus the half's own
    deviation.
    """
    losses = np.asarray(losses, dtype=np.float64)
    losses = losses[:, None] if losses.ndim == 1 else losses
    differences = second_differences(np.eye(len(losses)), at, epoch)
    x = differences @ np.asarray(waves, dtype=np.float64)
    return regress(differences @ losses, x, weights, differences @ differences.T)


def second_differences(values, at=None, epoch=None):
    """(2 x_j - x_{j-1} - x_{j+1}) / 4 of values f64[n, m] for j inside an epoch; unevenly read neighbours are
    interpolated.
    """
    n = len(values)
    at = np.arange(n, dtype=np.float64) if at is None else np.asarray(at, dtype=np.float64)
    epoch = np.zeros(n) if epoch is None else np.asarray(epoch)
    j = np.arange(1, max(1, n - 1))
    j = j[(epoch[j - 1] == epoch[j]) & (epoch[j] == epoch[j + 1])] if n > 2 else j[:0]
    part = ((at[j] - at[j - 1]) / (at[j + 1] - at[j - 1]))[:, None]
    return (values[j] - (1 - part) * values[j - 1] - part * values[j + 1]) / 2


def regress(y, x, weights, shared=None):
    """The Effect that y f64[n, T] = x f64[n, K] . effect fits best; x sums to zero over K. shared f64[n, n]:
    covariance of the errors of y up to a factor, default the identity.

    The degrees of freedom are Satterthwaite's. None where x has rank below K - 1 or none is left.
    """
    weights = np.asarray(weights, dtype=np.float64)
    K, shared = len(weights), np.eye(len(y)) if shared is None else shared
    rank = np.linalg.matrix_rank(x, tol=1e-9 * max(1e-30, np.abs(x).max(initial=0.0))) if len(x) else 0
    if K < 2 or rank < K - 1 or len(y) <= rank:
        return None
    solve = np.linalg.pinv(x, rcond=1e-9)
    rest = (np.eye(len(y)) - x @ solve) @ shared
    size = np.trace(rest)
    gauge = np.eye(K) - weights[None, :]  # the fit leaves a constant open; relative to the mixture it is none
    spread = ((y - x @ solve @ y) ** 2).sum(0) / size
    variance = np.diag(gauge @ solve @ shared @ solve.T @ gauge.T).clip(0.0)
    dof = int(max(1.0, np.floor(size**2 / np.trace(rest @ rest) + 1e-9)))
    return Effect((gauge @ solve @ y).T, np.sqrt(np.outer(spread, variance)), dof)


@dataclasses.dataclass
class Cycle:
    """One measurement ahead: from sample `start`, two halves of `half` samples, read at `end`; wave f64[K] as it is
    served.
    """

    start: int
    half: int
    end: int
    wave: list
    epoch: int
    switch: list | None = None  # losses at the end of the second half


class Waves:
    """The cycles to come and the readings taken. readings: dicts of sample, epoch, wave, switch, tail (losses
    f64[K]).
    """

    def __init__(self, domains):
        self.domains, self.count, self.epoch = domains, 0, 0
        self.base, self.cycles, self.readings = None, [], []

    def plan(self, first, last, base, period, half, delta, low, high):
        """Fill the samples first..last with cycles of `period` samples; returns the changes [(sample, weights
        f64[K])].
        """
        base = np.asarray(base, dtype=np.float64)
        if self.base is None or np.abs(base - self.base).max() > DROP:
            self.epoch += 1
        self.base = base
        changes = []
        for start in range(first, last - period + 1, period):
            v = self.draw(base, delta, low, high)
            if not v.any():
                break
            self.cycles.append(Cycle(start, half, start + period, v.tolist(), self.epoch))
            changes += [(start, base + v), (start + half, base - v), (start + 2 * half, base)]
        return changes

    def draw(self, base, delta, low, high):
        """The next wave f64[K]; signs that would move nothing are passed over, and after four periods all are turned round,
        so that responses of even order cancel in the long run.

        Zeros where bounds leave no room at all.
        """
        signs = walsh(2 << self.domains.bit_length(), self.domains)
        period = len(signs) // 2
        for _ in range(period):
            turned = 1.0 if self.domains == 2 else (-1.0) ** (self.count // (4 * period))
            v = wave(base, turned * signs[self.count % period], delta, low, high)
            self.count += 1
            if v.any():
                return v
        return np.zeros(self.domains)

    def drop(self, sample):
        """Give up the cycles that reach beyond `sample`: other weights hold from there."""
        self.cycles = [cycle for cycle in self.cycles if cycle.end <= sample]

    def due(self, sample, tail):
        """(cycle, "switch" | "tail") of the reading that belongs to `sample`, or None. tail: whether cycles have one."""
        for cycle in self.cycles:
            if cycle.end == sample:
                return cycle, "tail"
            if tail and cycle.start + 2 * cycle.half == sample:
                return cycle, "switch"
        return None

    def take(self, cycle, losses):
        """Keep the closing losses f64[K] of a cycle; returns the reading."""
        losses = np.asarray(losses, dtype=np.float64).tolist()
        self.cycles = [other for other in self.cycles if other.end > cycle.end]
        reading = {
            "sample": cycle.end,
            "epoch": cycle.epoch,
            "wave": list(cycle.wave),
            "switch": cycle.switch,
            "tail": losses,
        }
        self.readings = [*self.readings, reading][-KEPT:]
        return reading

    def state_dict(self):
        return {
            "count": self.count,
            "epoch": self.epoch,
            "base": None if self.base is None else self.base.tolist(),
            "cycles": [dataclasses.asdict(cycle) for cycle in self.cycles],
            "readings": self.readings,
        }

    def load_state_dict(self, state):
        self.count, self.epoch, self.readings = state["count"], state["epoch"], list(state["readings"])
        self.base = None if state["base"] is None else np.array(state["base"])
        self.cycles = [Cycle(**cycle) for cycle in state["cycles"]]


def effect_of(readings, weights, targets, kind="tail", since=-1):
    """The Effect f64[T, K] on targets f64[T, K] of the readings after sample `since`; None where they do not
    determine it.
    """
    chosen = [r for r in readings if r["sample"] > since and r[kind] is not None]
    if len(chosen) < 3:
        return None
    losses = np.array([r[kind] for r in chosen]) @ np.asarray(targets).T
    waves, at, epoch = ([r[key] for r in chosen] for key in ("wave", "sample", "epoch"))
    return demodulate(losses, waves, weights, at, epoch)
