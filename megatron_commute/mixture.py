"""Which domain serves sample n, under weights that change and budgets that do not.

The rule. Let w_d(j) be the weight in force for sample j, T_d(i) = sum_{j<i} w_d(j) the integrated
target and n_d(i) the samples domain d has served before sample i. Sample i goes to the domain of
positive weight with the greatest T_d - n_d, ties to the lowest d. Under one constant weight vector
that is w_d * max(i, 1) - n_d in float64: Megatron's `build_blending_indices`, bit for bit. After a
change at sample a the target goes on from where it stood, T_d(a) + w_d * (i - a), so nothing is
repeated and nothing skipped.

The bound. With e_d = T_d - n_d (they sum to zero) and K domains,
    -1 < e_d <= H_{K-1} = 1 + 1/2 + ... + 1/(K-1)  while weights are positive, no budget is used up,
    |e_d| <= K - 1                                 always, whatever is switched off, on or used up.
Both are 1 for K = 2. Proof, by the sets of the cup game (Adler et al. 2003): let S_j be the
greatest sum of e over j domains, so S_K = 0, and let m be the domain served. Take a set A of j
domains. If A holds m, then e_A changes by w(A) - 1 <= 0. Otherwise let F be the members of A that
weigh nothing now, c = j - |F| the others; each of these c has e <= e_m, so
    e_A + w(A) <= e_F + c/(c+1) * (e_A + e_m - e_F) + 1
    <= S_{j-c} / (c+1) + c/(c+1) * S_{j+1} + 1.
With F empty (c = j, S_0 = 0) the solution is S_j <= j * (1/j + ... + 1/(K-1)), hence S_1 <=
H_{K-1}; and m, the greatest of numbers that sum to zero, has e_m >= 0, hence e > -1 after it is
served. In general S_j = j * (K - j) solves it (its chord at j lies c >= 1 below it), hence
e_d <= K - 1, and -e_d <= S_{K-1} = K - 1. A budget that has run out is a domain whose weight is
zero ever after. Float64 adds its rounding, about 1e-16 * samples. (Domains switched on and off at
will are the carpool problem of Fagin and Williams 1983. Tijdeman's chairman assignment, 1980, stays
within 1 - 1/(2K-2), but it is not Megatron's rule.)

Budgets. A domain leaves when its budget is served; the others share its weight in proportion, from
that sample on. The endless domains (budget None) may together serve `samples` minus the budgets and
leave after that, so every budget ends exact. `minimum` and `maximum` hold to the end: a wish that
would make that impossible is replaced by the nearest weights (KL) that keep it possible, and
`projections` tells when.

Not here: which file a position stands for (sampler.py), and when weights should change
(controller.py).
"""

import math
from typing import NamedTuple

import numpy as np

from megatron_commute import feasible
from megatron_commute.feasible import nearest, normalised

try:  # compiled when the package was installed with a C++ compiler at hand; same results, see tests
    from megatron_commute.kernels._mixture import stretch
except ImportError:
    stretch = None

VERSION = 1
UNLIMITED = np.iinfo(np.int64).max


class Projection(NamedTuple):
    """Weights that could not be used as wished: from `sample` on, `used` instead of `wished`.

    Told when that moves K samples or more in the rest of the run; less is the rounding with which
    runs end.
    """

    sample: int
    wished: np.ndarray
    used: np.ndarray


def stretch_python(weights, credit, elapsed, first, served, origin, room, spare, domain, position, n):
    """The plain reference of csrc/mixture.cpp: up to n samples under one weight vector; the number.

    weights, credit f64[K]; elapsed: samples since the weights came into force; first: these are the
    run's first weights; served, origin i64[K]; room i64[K]: samples left of each budget, -1 for
    endless domains, which share `spare`. Updates `served` and writes domain, position i64[n] (or
    None). Stops after the sample that uses up a budget or the spare.
    """
    eligible = np.flatnonzero(weights > 0)
    w, c = weights[eligible], credit[eligible]
    count = (served - origin)[eligible].astype(np.float64)
    for i in range(n):
        time = float(max(elapsed + i, 1) if first else elapsed + i)
        chosen = int(np.argmax(c + w * time - count))
        d = int(eligible[chosen])
        if domain is not None:
            domain[i], position[i] = d, served[d]
        count[chosen] += 1.0
        served[d] += 1
        if room[d] >= 0:
            room[d] -= 1
            if room[d] == 0:
                return i + 1
        else:
            spare -= 1
            if spare == 0:
                return i + 1
    return n


class Mixture:
    """A stream of (domain, position): a function of weights, changes, budgets and sample index.

    weights f64[K]: shares of the samples, any scale. budgets: samples each domain serves in the
    whole run, or None for an endless domain (None for all: no budgets). samples: the run's total;
    default the sum of the budgets when every domain has one. minimum, maximum f64[K]: bounds of
    each weight. ValueError when these contradict. served i64[K], credit f64[K] (target minus
    served) and retired (samples of domains that are gone) say where a run that is taken over
    stands.
    """

    def __init__(
        self,
        weights,
        budgets=None,
        *,
        samples=None,
        minimum=None,
        maximum=None,
        served=None,
        credit=None,
        retired=0,
    ):
        self._wish = normalised(weights)
        K = self._wish.size
        self._limits(budgets, samples, minimum, maximum, retired)
        self._served = np.zeros(K, dtype=np.int64) if served is None else np.array(served, dtype=np.int64)
        self._credit = np.zeros(K) if credit is None else np.array(credit, dtype=np.float64)
        if self._served.shape != (K,) or self._credit.shape != (K,) or (self._served < 0).any():
            raise ValueError(f"served and credit: give {K} numbers each, served none below 0, or None")
        self.index = int(self._served.sum()) + self.retired
        owed = feasible.remaining(self.budgets, self._served)
        feasible.check(self.minimum, self.maximum, owed, self.samples, self.index)
        self._start, self._origin, self._weights = self.index, self._served.copy(), np.zeros(K)
        self._pending: list[tuple[int, np.ndarray]] = []
        self.projections: list[Projection] = []
        self._settle()

    def _limits(self, budgets, samples, minimum, maximum, retired) -> None:
        """What stays the same for the whole run."""
        K = self._wish.size
        self.retired = int(retired)
        self.budgets, self.samples = feasible.limits(budgets, samples, K, self.retired)
        self.minimum = np.zeros(K) if minimum is None else np.array(minimum, dtype=np.float64)
        self.maximum = np.ones(K) if maximum is None else np.array(maximum, dtype=np.float64)
        self._endless = np.array([b is None for b in self.budgets])
        self._limit = np.array([0 if b is None else b for b in self.budgets], dtype=np.int64)
        self._shared = None if self.samples is None else self.samples - self.retired - int(self._limit.sum())

    @property
    def served(self) -> np.ndarray:
        """Samples each domain has served so far, i64[K]; their sum is `index`."""
        return self._served.copy()

    @property
    def weights(self) -> np.ndarray:
        """Weights in force for the next sample, f64[K], after projection; zero at the end."""
        return self._weights.copy()

    @property
    def target(self) -> np.ndarray:
        """The integrated target T, f64[K]: weights in force summed over the samples so far."""
        return self._credit + self._weights * (self.index - self._start) + self._origin

    @property
    def credit(self) -> np.ndarray:
        """Target minus served, f64[K]: what the bound at the top of this file is about."""
        earned = self._credit + self._weights * (self.index - self._start)
        return earned - (self._served - self._origin)

    def schedule(self, weights, at_sample: int) -> None:
        """Use `weights` f64[K] from `at_sample` on; drops what was scheduled for then or later.

        ValueError when the sample has been served already. A sample beyond the end is legal and
        never reached.
        """
        wish = normalised(weights, self._wish.size)
        at_sample = int(at_sample)
        if at_sample < self.index:
            raise ValueError(
                f"weights scheduled for sample {at_sample}, but {self.index} samples are served: "
                f"schedule at {self.index} or later (with prefetching workers, use a longer `lead`)"
            )
        self._pending = [change for change in self._pending if change[0] < at_sample]
        self._pending.append((at_sample, wish))
        if at_sample == self.index:
            self._settle()

    def take(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The next n samples: domain i64[n] and position in it i64[n], which counts up from 0.

        ValueError, with nothing taken, when the run ends before.
        """
        n = self._checked(n)
        domain, position = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
        done = 0
        while done < n:
            done += self._run(n - done, domain[done:], position[done:])
        return domain, position

    def skip(self, n: int) -> None:
        """Serve the next n samples without saying which: `take` without its memory."""
        n = self._checked(n)
        while n:
            n -= self._run(n, None, None)

    def _checked(self, n) -> int:
        if n < 0 or n != int(n):
            raise ValueError(f"take({n}): give a whole number of samples >= 0")
        if self.samples is not None and self.index + n > self.samples:
            raise ValueError(
                f"take({n}) at sample {self.index} passes the end of the run at {self.samples}: take "
                f"{self.samples - self.index} or fewer, raise the budgets, or give one domain the budget null"
            )
        return int(n)

    def _run(self, n, domain, position) -> int:
        """Serve up to n samples, at most to the next event; returns how many."""
        events = [self._until, self._pending[0][0] if self._pending else None]
        n = min([n, *(event - self.index for event in events if event is not None)])
        room = np.where(self._endless, -1, self._limit - self._served)
        elapsed, first = self.index - self._start, self._start == 0
        run = stretch_python if stretch is None else stretch
        state = (self._weights, self._credit, elapsed, first, self._served, self._origin, room, self._spare())
        done = run(*state, domain, position, n)
        self.index += done
        used_up = not (room.all() and self._spare())  # perhaps long ago
        if self.index in events or (used_up and (self._weights * ~self._alive()).any()):
            self._settle()
        return done

    def _spare(self) -> int:
        """Samples the endless domains may still serve, together."""
        return UNLIMITED if self._shared is None else self._shared - int(self._served @ self._endless)

    def _alive(self) -> np.ndarray:
        return np.where(self._endless, self._spare() > 0, self._served < self._limit)

    def _settle(self) -> None:
        """An event: close the stretch at this sample, open the next with feasible weights."""
        self._credit = self.credit
        self._start, self._origin = self.index, self._served.copy()
        while self._pending and self._pending[0][0] <= self.index:
            self._wish = self._pending.pop(0)[1]
        self._weights, self._until = self._feasible()
        left = math.inf if self.samples is None else self.samples - self.index
        moved = np.abs(self._wish - self._weights).sum() / 2
        if moved > 0 and moved * left >= self._wish.size:
            self.projections.append(Projection(self.index, self._wish.copy(), self._weights.copy()))

    def _feasible(self) -> tuple[np.ndarray, int | None]:
        """The nearest weights to the wish that are feasible, and the sample they last to."""
        alive = self._alive()
        if not alive.any():
            return np.zeros(alive.size), None
        low, high = np.where(alive, self.minimum, 0.0), np.where(alive, self.maximum, 0.0)
        spread = np.where(
            self._endless, max(self._spare() / self._wish.size, 1.0), self._limit - self._served
        )
        wish, endless = np.where(alive, self._wish, 0.0), self._endless & alive
        if self.samples is None or (not low.any() and (high[alive] == 1).all()):
            return nearest(wish, low, high, 1.0, spread), None
        left = self.samples - self.index
        need = np.where(self._endless, 0.0, self._limit - self._served - self._credit)
        bounds = feasible.Bounds(low, high, need, alive & ~self._endless, endless, left)
        weights, room = bounds.weights(wish, spread)
        return weights, None if math.isinf(room) else min(self.index + int(room), self.samples)

    def copy(self) -> "Mixture":
        """An independent mixture at the same sample, without projections; O(K + changes)."""
        twin = object.__new__(Mixture)
        twin.__dict__.update(self.__dict__)
        twin._served, twin._pending, twin.projections = self._served.copy(), list(self._pending), []
        return twin

    def state_dict(self) -> dict:
        """Everything the rest of the stream depends on, as JSON (floats survive it exactly)."""
        return {
            "version": VERSION,
            "index": self.index,
            "retired": self.retired,
            "served": self._served.tolist(),
            "start": self._start,
            "origin": self._origin.tolist(),
            "credit": self._credit.tolist(),
            "wish": self._wish.tolist(),
            "weights": self._weights.tolist(),
            "until": self._until,
            "pending": [[sample, wish.tolist()] for sample, wish in self._pending],
            "budgets": list(self.budgets),
            "samples": self.samples,
            "minimum": self.minimum.tolist(),
            "maximum": self.maximum.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict) -> "Mixture":
        """The mixture of a `state_dict`. ValueError for another version or a damaged one."""
        _check_state(state)
        mixture = object.__new__(cls)
        mixture._wish = np.array(state["wish"], dtype=np.float64)
        mixture._limits(*(state[key] for key in ("budgets", "samples", "minimum", "maximum", "retired")))
        mixture._served = np.array(state["served"], dtype=np.int64)
        mixture._origin = np.array(state["origin"], dtype=np.int64)
        mixture._credit = np.array(state["credit"], dtype=np.float64)
        mixture._weights = np.array(state["weights"], dtype=np.float64)
        mixture.index, mixture._start, mixture._until = state["index"], state["start"], state["until"]
        mixture._pending = [(sample, np.array(wish, dtype=np.float64)) for sample, wish in state["pending"]]
        mixture.projections = []
        return mixture


KEYS = {
    "version",
    "index",
    "retired",
    "served",
    "start",
    "origin",
    "credit",
    "wish",
    "weights",
    "until",
    "pending",
}
KEYS |= {"budgets", "samples", "minimum", "maximum"}


def _check_state(state) -> None:
    cure = "load an intact checkpoint, or start a new mixture"
    if state.get("version") != VERSION:
        raise ValueError(f"mixture state of version {state.get('version')}, this is {VERSION}: {cure}")
    missing = KEYS - set(state)
    if missing:
        raise ValueError(f"mixture state without {', '.join(sorted(missing))}: {cure}")
    K = len(state["wish"])
    for name in ("served", "origin", "credit", "weights", "budgets", "minimum", "maximum"):
        if len(state[name]) != K:
            raise ValueError(f"mixture state: {len(state[name])} entries of {name} for {K} domains: {cure}")
    counted = sum(state["served"]) + state["retired"], sum(state["origin"]) + state["retired"]
    if counted != (state["index"], state["start"]) or min(state["origin"]) < 0:
        raise ValueError(f"mixture state: the samples served do not sum to the index: {cure}")
    if not np.isfinite(state["credit"] + state["weights"] + state["wish"]).all():
        raise ValueError(f"mixture state holds a number that is not finite: {cure}")
    for d, (served, budget) in enumerate(zip(state["served"], state["budgets"], strict=True)):
        if served < state["origin"][d] or (budget is not None and served > budget):
            raise ValueError(f"mixture state: domain {d} served {served} of a budget of {budget}: {cure}")
    samples = [sample for sample, _ in state["pending"]]
    if samples != sorted(set(samples)) or any(sample <= state["index"] for sample in samples):
        raise ValueError(f"mixture state: pending changes out of order or in the past: {cure}")
    if any(len(wish) != K for _, wish in state["pending"]):
        raise ValueError(f"mixture state: a pending change is not for {K} domains: {cure}")
