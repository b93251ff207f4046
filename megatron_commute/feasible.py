"""The weights nearest to a wish that still let budgets, minima and maxima hold to the end of the
run.
"""

import math
from typing import NamedTuple

import numpy as np

ROUNDS = 500  # of the search for a schedule; ten do unless bounds leave hardly any room
RIDGE = 1e-3  # at most, of its curvature: a domain at its bounds everywhere has none of its own
LONGEST = 4.0  # step of a logarithm in one round


def normalised(weights, count=None) -> np.ndarray:
    """Weights f64[K] that sum to one; untouched when they do already (to 1e-12), as Megatron's
    table needs them.
    """
    result = np.array(weights, dtype=np.float64)
    if result.ndim != 1 or result.size == 0 or (count is not None and result.size != count):
        wanted = "one number for each domain" if count is None else f"{count} numbers, one for each domain"
        raise ValueError(f"weights of shape {result.shape}: give {wanted}")
    if not np.isfinite(result).all() or (result < 0).any() or not result.any():
        raise ValueError(f"weights {result.tolist()}: give finite numbers >= 0, at least one of them above 0")
    total = math.fsum(result)
    return result if abs(total - 1.0) <= 1e-12 else result / total


def owed_shares(owed, samples, planned) -> np.ndarray:
    """Weights f64[K] under which what is `owed` to every budget runs out exactly after `samples`.

    owed f64[K]: samples left of each budget, NaN for endless domains, which share the rest in
    proportion to `planned` f64[K], equally where that is zero.
    """
    endless = np.isnan(owed)
    shares = np.where(endless, 0.0, owed) / samples
    rest = max(0.0, 1.0 - shares.sum())
    if endless.any():
        parts = np.where(endless, planned, 0.0)
        parts = parts if parts.sum() > 0 else endless.astype(np.float64)
        shares = shares + rest * parts / parts.sum()
    return shares / shares.sum()


def nearest(wish, low, high, mass=1.0, spread=None) -> np.ndarray:
    """The weights with low <= w <= high (f64[K]) and sum `mass` that are nearest to `wish` in KL
    divergence.

    They are w_k = clip(a * wish_k, low_k, high_k) with one a for all. Domains whose wish is zero
    get more than `low` only when the others stand at `high`; they share what is left in proportion
    to `spread` (default equal). When the box holds no such weights (rounding at the end of a run)
    the nearer corner is scaled to the mass.
    """
    lows, highs = math.fsum(low), math.fsum(high)
    if (wish >= low).all() and (wish <= high).all() and abs(math.fsum(wish) - mass) <= 1e-12:
        return wish.copy()
    if highs <= mass or lows >= mass:
        corner, total = (high, highs) if highs <= mass else (low, lows)
        return corner / total * mass if total > 0 else corner.copy()
    wished = wish > 1e-200  # smaller ones would overflow below
    ceiling = math.fsum(np.where(wished, high, low))
    if ceiling < mass:
        rest = np.ones_like(wish) if spread is None else spread
        rest = np.where(rest > 0, rest, np.finfo(float).tiny)
        result = high.copy()
        result[~wished] = nearest(rest[~wished], low[~wished], high[~wished], mass - math.fsum(high[wished]))
        return result
    q = np.where(wished, wish, 1.0)
    scale = _scale(q, low, np.where(wished, high, low), mass)
    return np.where(wished, np.clip(scale * q, low, high), low)


def _scale(q, low, high, mass) -> float:
    """The a with sum(clip(a * q, low, high)) = mass, found exactly between two of the 2K
    breakpoints.
    """
    steps = np.unique(np.concatenate([low / q, high / q]))
    left, right = 0, len(steps) - 1
    while right - left > 1:
        middle = (left + right) // 2
        if math.fsum(np.clip(steps[middle] * q, low, high)) <= mass:
            left = middle
        else:
            right = middle
    inside = 0.5 * (steps[left] + steps[right])
    free = (inside * q > low) & (inside * q < high)
    if not free.any():
        return float(steps[left])
    fixed = math.fsum(np.clip(inside * q, low, high)[~free])
    return min(max((mass - fixed) / math.fsum(q[free]), steps[left]), steps[right])


class Bounds(NamedTuple):
    """Weight bounds that must still hold at the end, for budgeted domains and for the endless ones
    as a group.
    """

    low: np.ndarray
    high: np.ndarray
    need: np.ndarray  # samples the target still owes each budget, f64[K]
    budgeted: np.ndarray
    endless: np.ndarray
    left: int

    def weights(self, wish, spread) -> tuple[np.ndarray, float]:
        """Feasible weights and for how many samples they stay feasible.

        The rest of the run is possible while need / left lies inside the bounds. A domain that
        reaches a bound keeps the rate need / left from there to the end.
        """
        low, high, group = self.low.copy(), self.high.copy(), None
        spare = self.left - math.fsum(self.need[self.budgeted])
        ends = [math.fsum(self.low[self.endless]), math.fsum(self.high[self.endless])]
        while True:
            result = self._share(wish, low, high, group, spread)
            room = np.full(wish.size, np.inf)
            free = self.budgeted & (low < high)
            inside = zip(self.need[free], self.low[free], self.high[free], result[free], strict=True)
            room[free] = [_room(*domain, self.left) for domain in inside]
            total = math.fsum(result[self.endless])
            slack = (
                _room(spare, *ends, total, self.left) if group is None and self.endless.any() else math.inf
            )
            pinned = room < 1
            if not pinned.any() and slack >= 1:
                return result, min(room.min(), slack)
            rate = np.clip(self.need / self.left, self.low, self.high)
            low[pinned] = high[pinned] = rate[pinned]
            if slack < 1:
                group = min(max(spare / self.left, ends[0]), ends[1])

    def _share(self, wish, low, high, group, spread):
        if group is None or not self.budgeted.any():
            return nearest(wish, low, high, 1.0, spread)
        result = np.zeros_like(wish)
        for part, mass in ((self.budgeted, 1.0 - group), (self.endless, group)):
            result[part] = nearest(wish[part], low[part], high[part], mass, spread[part])
        return result


def _room(need, low, high, weight, left) -> float:
    """For how many samples `weight` keeps low <= need / left <= high. Bounds 0 and 1 are left to
    the counters.
    """
    room = math.inf
    if high < 1 and weight < high:
        room = (high * left - need) / (high - weight)
    if low > 0 and weight > low:
        room = min(room, (need - low * left) / (weight - low))
    return max(room, 0.0)


def limits(budgets, samples, K: int, retired: int) -> tuple[tuple[int | None, ...], int | None]:
    """Budgets and the run's total, checked. `retired`: samples of domains that left before."""
    budgets = [None] * K if budgets is None else list(budgets)
    if len(budgets) != K:
        raise ValueError(f"{len(budgets)} budgets for {K} weights: give one budget (or None) for each domain")
    for d, budget in enumerate(budgets):
        if budget is not None and (budget != int(budget) or budget < 0):
            raise ValueError(f"budget {budget} of domain {d}: give a whole number of samples >= 0, or None")
    if samples is not None and (samples != int(samples) or samples < 0):
        raise ValueError(f"a run of {samples} samples: give a whole number >= 0, or None")
    budgets = tuple(None if budget is None else int(budget) for budget in budgets)
    total = sum(budget for budget in budgets if budget is not None) + retired
    if samples is None:
        return budgets, None if None in budgets else total
    if samples < total:
        raise ValueError(f"budgets of {total} samples in a run of {samples}: lower them or train longer")
    if samples > total and None not in budgets:
        problem = f"budgets of {total} samples in a run of {samples}"
        raise ValueError(f"{problem}: raise them, or give one domain the budget null")
    return budgets, int(samples)


def remaining(budgets, served) -> list[int | None]:
    """Samples left of each budget; ValueError when more are served already."""
    for d, (budget, count) in enumerate(zip(budgets, served, strict=True)):
        if budget is not None and count > budget:
            raise ValueError(
                f"domain {d} has served {count} of a budget of {budget}: raise it to at least {count}"
            )
    return [
        None if budget is None else budget - int(count) for budget, count in zip(budgets, served, strict=True)
    ]


def check(low, high, owed, samples, index) -> None:
    """ValueError when no weights in [low, high], f64[K] each, can serve what is `owed` from sample
    `index` on.

    owed: samples left of each budget, None for endless domains. samples: the run's total, or None.
    """
    K = len(owed)
    if low.shape != (K,) or high.shape != (K,):
        raise ValueError(f"minimum {low.shape} and maximum {high.shape}: give {K} numbers each, or None")
    if not ((low >= 0) & (low <= high) & (high <= 1)).all():
        raise ValueError("minimum and maximum: 0 <= minimum <= maximum <= 1 must hold for every domain")
    if math.fsum(low) > 1 + 1e-9 or math.fsum(high) < 1 - 1e-9:
        raise ValueError("minimum must sum to at most 1 and maximum to at least 1: lower or raise them")
    endless = np.array([budget is None for budget in owed])
    if samples is None:
        if low[~endless].any() or math.fsum(high[endless]) < 1 - 1e-9:
            raise ValueError(
                "bounds cannot hold after the budgets have run out: give `samples`, the run's total, or drop "
                "the minimum of the budgeted domains and the maximum of the endless ones"
            )
        return
    left, slack = samples - index, K if index else 0
    rows = [(f"domain {d}", owed[d], low[d], high[d]) for d in np.flatnonzero(~endless)]
    if endless.any():
        spare = left - sum(budget for budget in owed if budget is not None)
        if spare < 0:
            raise ValueError(
                f"budgets ask for {left - spare} of the {left} samples left: lower them or train longer"
            )
        rows.append(("the endless domains", spare, math.fsum(low[endless]), math.fsum(high[endless])))
    for name, need, floor, ceiling in rows:
        least, most = math.floor(floor * left + 1e-6) - slack, math.ceil(ceiling * left - 1e-6) + slack
        if not least <= need <= most or (need > 0 and ceiling == 0):
            raise ValueError(
                f"{name}: {need} of the {left} samples left is outside the weight bounds "
                f"[{floor:g}, {ceiling:g}] to the end: change the budget or the bounds"
            )


def nearest_schedule(wish, sizes, budgets, low, high) -> np.ndarray:
    """The weights f64[M, K] of a whole schedule nearest to `wish` f64[M, K] > 0 in KL divergence,
    by samples.

    sizes f64[M]: samples of each segment; budgets f64[K]: samples of each domain, in sum those of
    the segments. Rows sum to one, columns serve their budgets, and w_mk = clip(a_m b_k wish_mk,
    low_k, high_k). ValueError when a budget is outside its bounds on average; else the constant
    weights show that some exist.
    """
    wish, sizes, budgets = (np.asarray(x, dtype=np.float64) for x in (wish, sizes, budgets))
    if not (np.isfinite(wish).all() and (wish > 0).all() and (sizes > 0).all()):
        raise ValueError("wishes and segments of a schedule: give finite numbers above 0")
    total = math.fsum(sizes)
    if abs(math.fsum(budgets) - total) > 1e-9 * total:
        raise ValueError(f"budgets of {math.fsum(budgets):g} samples in {total:g}: give equal sums")
    share = budgets / total
    for k in np.flatnonzero((share < low - 1e-9) | (share > high + 1e-9)):
        raise ValueError(
            f"domain {k}: {budgets[k]:g} of the {total:g} samples left is outside the weight bounds "
            f"[{low[k]:g}, {high[k]:g}] to the end: change the budget or the bounds"
        )
    result = np.tile(share, (len(sizes), 1))
    free = (share > low + 1e-12) & (share < high - 1e-12)  # others stand at their bound all along
    if len(sizes) > 1 and free.sum() > 1:
        q, bounds = wish[:, free], (low[free], high[free])
        result[:, free] = _projected(q, sizes / total, share[free], *np.broadcast_arrays(*bounds, q)[:2])
    return result


def _projected(q, sizes, share, low, high) -> np.ndarray:
    """clip(a_m b_k q_mk, low, high) f64[M, K] with equal row sums and sizes f64[M] @ columns =
    share f64[K].

    Newton's method on log b for the concave dual, whose slope is what the columns lack, every row
    with the a that it needs; a step that goes too far, so that the slope along it turns round, is
    shortened.
    """
    mass = np.full(len(q), math.fsum(share))

    def rows(log_b):
        tilted = q * np.exp(log_b - log_b.max())
        w = np.clip(_scales(tilted, low, high, mass)[:, None] * tilted, low, high)
        return log_b, w, share - sizes @ w

    log_b, w, off = rows(np.zeros(len(share)))
    for _ in range(ROUNDS):
        inner = np.where((w > low) & (w < high), w, 0.0)
        part = inner / np.maximum(inner.sum(1, keepdims=True), np.finfo(float).tiny)
        curvature = np.diag(sizes @ inner) - (sizes[:, None] * inner).T @ part
        error = np.abs(off).max()
        step = np.linalg.solve(curvature + np.diag(share * min(error, RIDGE) + 1e-15), off)
        if error <= 1e-12:  # one linear step takes the rest to rounding
            return np.clip(w + inner * (step - (part @ step)[:, None]), low, high)
        step *= min(1.0, LONGEST / np.abs(step).max())
        gain = slope = off @ step
        while True:
            ahead = rows(log_b + step)
            slope = ahead[2] @ step
            if slope >= -0.5 * gain:
                break
            shorter = min(max(gain / (gain - slope), 0.1), 0.6)
            step, gain = shorter * step, shorter * gain
        log_b, w, off = ahead
    raise ValueError("budgets and bounds of a schedule leave hardly any room: widen the bounds")


def _scales(q, low, high, mass) -> np.ndarray:
    """`_scale` of every row: the a f64[M] with sum_k clip(a_m q_mk, low_mk, high_mk) = mass_m."""
    every, steps = np.arange(len(q)), np.sort(np.concatenate([low / q, high / q], axis=1), axis=1)
    left, right = np.zeros(len(q), dtype=int), np.full(len(q), steps.shape[1] - 1)
    while (right - left > 1).any():
        middle = (left + right) // 2
        below = np.clip(steps[every, middle][:, None] * q, low, high).sum(1) <= mass
        left, right = np.where(below, middle, left), np.where(below, right, middle)
    start, end = steps[every, left], steps[every, right]
    inside = 0.5 * (start + end)[:, None] * q
    free = (inside > low) & (inside < high)
    fixed = np.where(free, 0.0, np.clip(inside, low, high)).sum(1)
    slope = np.where(free, q, 0.0).sum(1)
    exact = (mass - fixed) / np.where(slope > 0, slope, 1.0)
    return np.where(slope > 0, exact.clip(start, end), start)
