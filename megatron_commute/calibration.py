"""Calibration: what signals foretold against what was measured later. Pure functions.

A signal says, for every domain, how much moving weight onto it now and giving it back later changes the target loss (an
"effect", see lockin.Effect). Measured effects are judged after a common tail. A signal is worth its hit rate on the signs
that were measured beyond doubt, and its scale, measured over foretold size. The constant LAST, "the domain trained last
gains", needs no measurement: a signal that does not beat it has shown nothing.
"""

import math
from typing import NamedTuple

import numpy as np

from megatron_commute import bracket
from megatron_commute.lockin import Effect

LAST = "last gains"
ENOUGH = 5  # comparisons without which a signal counts as uncalibrated
KEPT = 200  # comparisons of one signal that its scale is taken from
CONFIDENCE = 0.95  # of the intervals of hit rate and scale


class Calibration(NamedTuple):
    """Of one signal: hits of n comparisons, and silent ones (nothing foretold); rate and its Wilson interval; scale,
    measured over foretold size as a geometric mean, with its interval; dex: the spread of log10 of that ratio. None
    where there is too little to say.
    """

    hits: int
    n: int
    silent: int
    rate: float | None
    low: float | None
    high: float | None
    scale: float | None
    scale_low: float | None
    scale_high: float | None
    dex: float | None

    @property
    def trusted(self):
        """Whether the signal has earned trust: enough comparisons, and more hits than chance beyond doubt."""
        return self.n >= ENOUGH and self.low is not None and self.low > 0.5


def student(dof, confidence=CONFIDENCE):
    """Student's two-sided quantile: standard errors that a value must exceed to differ from zero with `confidence`."""
    from scipy.special import stdtrit

    return float(stdtrit(dof, 0.5 + confidence / 2))


def wilson(hits, n, confidence=CONFIDENCE):
    """Wilson's score interval (low, high) of a rate seen as `hits` of `n` > 0 (Wilson 1927)."""
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    rate, share = hits / n, z * z / n
    middle = (rate + share / 2) / (1 + share)
    half = z / (1 + share) * math.sqrt(rate * (1 - rate) / n + share / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def foretold(found, target, weights, rate, window, names):
    """Predictions {signal: effect f64[K]} of a probe: the bracket, recency, and the constant LAST.

    found: probe.Measurement with one target; target, weights f64[K]; rate: learning rate; window: steps of one half of a
    measurement; names: (metric, direction). The bracket's is e^2 score_k with e = rate x window (bracket.py), recency's
    e (u . g_k), relative to the mixture: what the target loses when k's gradient comes early instead of last.
    """
    e = rate * window
    recency = np.asarray(found.u_g[0]) - found.u_g[0] @ weights
    kind = "/".join(names)
    told = {
        f"P {kind}": bracket.predicted_excess_loss(found.score[0], 1.0, e),
        f"recency {names[0]}": e * recency,
    }
    told[LAST] = np.asarray(target) - target @ weights
    return {name: values.tolist() for name, values in told.items() if np.isfinite(values).all()}


def compare(told, measured, se, dof, weights, confidence=CONFIDENCE):
    """(hits, misses, silent, log ratios) of one signal told f64[K] against a measured effect f64[K] with its se.

    Only what differs from zero with `confidence` is judged. Relative to the mixture one of K effects follows from the
    others: that of the heaviest domain is left out. Log ratios: ln(measured / told) of the hits.
    """
    told, measured, se = (np.asarray(a, dtype=np.float64) for a in (told, measured, se))
    sure = np.abs(measured) > student(dof, confidence) * se
    sure[int(np.argmax(weights))] = False
    silent = sure & (np.abs(told) <= 1e-12 * max(1e-300, np.abs(told).max(initial=0.0)))
    hit = sure & ~silent & (np.sign(told) == np.sign(measured))
    missed = int((sure & ~silent & ~hit).sum())
    logs = np.log(np.abs(measured[hit]) / np.abs(told[hit]))
    return int(hit.sum()), missed, int(silent.sum()), logs.tolist()


def update(book, predictions, effect, weights):
    """The book {signal: {hits, misses, silent, logs}} after comparing predictions {signal: [K]} with a measured
    lockin.Effect of one target. Returns a new book.
    """
    book = {name: dict(entry) for name, entry in book.items()}
    for name, told in predictions.items():
        entry = book.setdefault(name, {"hits": 0, "misses": 0, "silent": 0, "logs": []})
        hits, misses, silent, logs = compare(told, effect.value[0], effect.se[0], effect.dof, weights)
        entry["hits"] += hits
        entry["misses"] += misses
        entry["silent"] += silent
        entry["logs"] = [*entry["logs"], *logs][-KEPT:]
    return book


def book_of(lines):
    """The book that the calibration lines of a record add up to."""
    book = {}
    for line in lines:
        value, se = np.array([line["effect"]]), np.array([line["effect_se"]], dtype=np.float64)
        measured = Effect(value, se, line["effect_dof"])
        book = update(book, line["signals"], measured, line["weights"])
    return book


def judged(entry):
    """The Calibration that a book's entry amounts to."""
    hits, n = entry["hits"], entry["hits"] + entry["misses"]
    rate, low, high = (hits / n, *wilson(hits, n)) if n else (None, None, None)
    return Calibration(hits, n, entry["silent"], rate, low, high, *scale_of(entry["logs"]))


def scale_of(logs, confidence=CONFIDENCE):
    """(scale, low, high, dex) of log ratios f64[n]: geometric mean with Student's interval on the logarithms."""
    if not logs:
        return None, None, None, None
    logs = np.asarray(logs, dtype=np.float64)
    scale = float(np.exp(logs.mean()))
    if len(logs) < 2:
        return scale, None, None, None
    spread = float(logs.std(ddof=1))
    half = student(len(logs) - 1, confidence) * spread / math.sqrt(len(logs))
    return scale, scale * math.exp(-half), scale * math.exp(half), spread / math.log(10)


def signal_of(law, names):
    """The signal that a law acts on, None where it acts on none that is calibrated; names: (metric, direction)."""
    return {"tilt": f"P {'/'.join(names)}", "response": "persistence"}.get(law)


def for_law(found):
    """(scale, scale_interval) of controller.Situation for the Calibration of the law's signal.

    (None, None) while there are too few comparisons. A signal whose signs are not better than chance gets an interval
    around zero, which holds no sign, so that no law acts on it.
    """
    if found is None or found.n < ENOUGH or found.scale is None:
        return None, None
    high = found.scale_high if found.scale_high is not None else found.scale
    low = found.scale_low if found.scale_low is not None else found.scale
    return found.scale, (low, high) if found.trusted else (-high, high)


def table(book):
    """Headers and rows of text, one for each signal, the best-trusted first."""
    headers = [
        "signal",
        "hits",
        "hit rate, 95 %",
        "measured / foretold, 95 %",
        "spread, dex",
        "hits beyond the constant",
    ]
    beyond, text = against_constant(book), []
    order = sorted(book, key=lambda name: (-(judged(book[name]).low or 0.0), name))
    for name in order:
        found = judged(book[name])
        rate = "-" if found.rate is None else f"{found.rate:.0%} ({found.low:.0%} to {found.high:.0%})"
        scale = "-" if found.scale is None else f"{found.scale:.2g}"
        if found.scale_low is not None:
            scale += f" ({found.scale_low:.2g} to {found.scale_high:.2g})"
        dex = "-" if found.dex is None else f"{found.dex:.2f}"
        more = "-" if beyond[name] is None or name == LAST else f"{beyond[name] / 2:+g}".replace("-", "−")
        text.append([name, f"{found.hits} of {found.n}", rate, scale, dex, more])
    return headers, text


def against_constant(book):
    """{signal: (hits - misses) more than the constant LAST has in the same record}, None where LAST was never judged."""
    last = book.get(LAST)
    if last is None or not last["hits"] + last["misses"]:
        return dict.fromkeys(book)
    return {name: e["hits"] - e["misses"] - last["hits"] + last["misses"] for name, e in book.items()}
