"""Planned weights from a file: points of the run, and how the weights go on between them.

A CSV file with one row for each point and one column of weights for each domain:

    at,then,en,de,code
    0,linear,0.8,0.2,0
    50%,cosine,0.5,0.3,0.2
    3.1Mtok,hold,0.2,0.2,0.6

`at`: a sample (12000), tokens (3.1Mtok) or a part of the run (50%). `then`: hold (default), linear
or cosine, the way to the next point; the last point holds to the end. A column named `sample` does
for `at`. Before the first point the run's own weights hold.
"""

import csv
import io
import itertools
import math
import re
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from megatron_commute.settings import text_files
from megatron_commute.settings.yaml_checks import LARGEST_NUMBER, one_line, shown, written_number

WAYS = ("hold", "linear", "cosine")
SCALE = {"": 0, "k": 3, "M": 6, "G": 9, "B": 9, "T": 12}
BARS = " ▁▂▃▄▅▆▇█"
TOLERANCE = 1e-6
MOST_ROUNDING = 1e-3  # beyond it a sum is a slip, however few the digits
BUDGET_TOLERANCE = 0.01
LARGEST = 16 << 20  # bytes of a file


class Point(NamedTuple):
    """From `sample` on: `weights` f64[K], then hold them or move on to the next point's, linear or
    cosine.
    """

    sample: int
    weights: np.ndarray
    then: str = "hold"


def read(path, names, samples: int, seq_length: int) -> tuple[Point, ...]:
    """The points of a CSV file for a run of `samples` sequences of `seq_length` tokens.

    ValueError naming file, line and cure for what cannot be read or is no schedule of the domains
    `names`.
    """
    return of_text(text_files.read(path, LARGEST, "a CSV file"), path, names, samples, seq_length)


def of_text(text: str, path, names, samples: int, seq_length: int) -> tuple[Point, ...]:
    """The points of the text of such a file; as `read`."""
    table = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    points: list[Point] = []
    try:
        header = [cell.strip() for cell in next(table, [])]
        where = "sample" if "sample" in header else "at"
        if sorted(set(header) - {"then"}) != sorted([where, *names]) or len(set(header)) != len(header):
            wanted = ",".join(["at", "then", *names])
            told = shown(",".join(header)) if header else "missing"
            apart = " (commas between the columns)" if len(header) == 1 else ""
            raise ValueError(f"the columns are {told}; write {wanted}{apart}")
        for cells in table:
            if not any(cell.strip() for cell in cells):
                continue  # spreadsheets leave such rows below a table
            point = _point(header, cells, names, (where, samples, seq_length))
            if points and point.sample <= points[-1].sample:
                at = cells[header.index(where)]
                raise ValueError(f"{at} is sample {point.sample}; write points that rise")
            points.append(point)
    except csv.Error as error:
        raise ValueError(f"{path}:{table.line_num}: {error}; correct the quotes of the line") from error
    except ValueError as error:
        raise ValueError(one_line(f"{path}:{max(table.line_num, 1)}: {error}")) from error
    if not points:
        raise ValueError(f"{path}: no points; write a row such as 0,hold,{','.join(['0.5'] * len(names))}")
    return tuple(points)


def _point(header, cells, names, place) -> Point:
    """The Point of one row. place: name of the column of places, samples of the run, length of a
    sequence.
    """
    if len(cells) != len(header):
        raise ValueError("the row has not as many columns as the header; write one number for each domain")
    row = dict(zip(header, cells, strict=True))
    found = {name: written_number(row[name]) for name in names}
    for name, weight in found.items():
        if weight is None:
            raise ValueError(f"{shown(row[name])} is no number; write a number for each domain, such as 0.5")
    weights = np.array([float(weight) for weight in found.values()])
    total, told = math.fsum(weights), [row[name] for name in names]
    if not (weights >= 0).all() or abs(total - 1) > _rounding(told):
        numbers = shown(weights.tolist())
        raise ValueError(f"weights {numbers} sum to {total:.6g}; write numbers >= 0 that sum to 1")
    then = (row.get("then") or "hold").strip()
    if then not in WAYS:
        raise ValueError(f"then: {shown(then)}; write one of {', '.join(WAYS)}")
    return Point(_sample(row[place[0]].strip(), *place[1:]), weights / total, then)


def _rounding(written) -> float:
    """How far from 1 the sum of weights may be that were rounded to the digits in which they are
    `written`.
    """
    halves = [Decimal(5).scaleb(written_number(text).as_tuple().exponent - 1) for text in written]
    return min(float(sum(halves)) + TOLERANCE, MOST_ROUNDING)


def _sample(at: str, samples: int, seq_length: int) -> int:
    """The sample that `at` names; fractions of a sample count as the next whole one."""
    match = re.fullmatch(r"([\d_.]+(?:[eE][+-]?\d+)?)\s*(%|([kMGBT]?)tok(?:ens)?)?", at, flags=re.ASCII)
    value = written_number(match[1]) if match else None
    if value is None or value > LARGEST_NUMBER or (match[2] == "%" and value > 100):
        value = None
    elif match[2] is None:
        value = value if value == int(value) else None
    elif match[2] == "%":
        value = value / 100 * samples
    else:
        value = value.scaleb(SCALE[match[3]]) / seq_length
    if value is None:
        raise ValueError(
            f"'{shown(at)}' is no point of a run; write samples (12000), tokens (3.1Mtok) or a part (50%)"
        )
    return math.ceil(value)


def changes(points, batches, stairs: int = 100) -> tuple[tuple[int, np.ndarray], ...]:
    """The schedule as changes (sample, weights f64[K]) at global batches, for Mixture.schedule.
    batches: batches.Batches of the run.

    A point takes effect at the next whole global batch. A ramp becomes at most `stairs` equal
    steps, each with the ramp's own mean over it, so a domain gets the samples of the ramp.
    """
    found: dict[int, np.ndarray] = {}
    for point, after in zip(points, [*points[1:], None], strict=True):
        found[batches.next(point.sample)] = point.weights
        if after is None or point.then == "hold":
            continue
        length = after.sample - point.sample
        count = min(stairs, math.ceil(length / batches.full))
        exact = [point.sample + length * step / count for step in range(count + 1)]
        edges = sorted({batches.next(math.ceil(edge)) for edge in exact})
        for start, end in itertools.pairwise(edges):
            part = [min((edge - point.sample) / length, 1.0) for edge in (start, end)]
            if part[0] < 1.0:
                found[start] = point.weights + (after.weights - point.weights) * _mean(point.then, *part)
    return tuple(sorted(found.items(), key=lambda change: change[0]))


def _mean(way: str, start: float, end: float) -> float:
    """Mean over [start, end] of the way from 0 to 1: u if linear, (1 - cos(pi u)) / 2 if cosine."""
    if way == "linear":
        return (start + end) / 2
    return 0.5 - (math.sin(math.pi * end) - math.sin(math.pi * start)) / (2 * math.pi * (end - start))


def planned_counts(initial, planned, samples: int) -> np.ndarray:
    """Samples f64[K] that `planned` changes ask of each domain in a run that begins with `initial`
    weights f64[K].
    """
    steps = [(0, np.asarray(initial, dtype=np.float64)), *((at, w) for at, w in planned if at < samples)]
    ends = [at for at, _ in steps[1:]] + [samples]
    return np.sum([weights * (end - at) for (at, weights), end in zip(steps, ends, strict=True)], axis=0)


def refuse_impossible(initial, planned, names, budgets, samples, minimum, maximum) -> None:
    """ValueError when the schedule passes a bound, or misses a budget by over 1 % (less is the
    mixture's to mend).

    initial, minimum, maximum f64[K]; planned: of `changes`; budgets: samples or None.
    """
    for at, weights in planned:
        outside = (weights < minimum - TOLERANCE) | (weights > maximum + TOLERANCE)
        for d in np.flatnonzero(outside):
            raise ValueError(
                f"sample {at}: weight {weights[d]:.6g} of {names[d]} is outside min {minimum[d]:g}, "
                f"max {maximum[d]:g}; change the point or the bounds"
            )
    counts = planned_counts(initial, planned, samples)
    for name, count, budget in zip(names, counts, budgets, strict=True):
        if budget is not None and abs(count - budget) > max(BUDGET_TOLERANCE * budget, len(names)):
            raise ValueError(
                f"the schedule asks for {count:.0f} samples of {name}, its budget is {budget}; "
                f"write points that add up to it, budget: {count:.0f}, or budget: null"
            )


def written(names, planned) -> str:
    """Text of a CSV file that `read` and `changes` make the same changes of."""
    rows = [",".join([str(at), *(repr(float(w)) for w in weights)]) for at, weights in planned]
    return "\n".join([",".join(["at", *names]), *rows]) + "\n"


def drawing(names, initial, planned, samples: int, width: int = 60, rates=None) -> list[str]:
    """One line of text for each domain: its weight along the run in `width` bars, and its planned
    samples.

    rates: learning rate f64[T] of every step, which adds a line in parts of its peak.
    """
    at = [0, *(start for start, _ in planned)]
    weights = np.array([initial, *(w for _, w in planned)], dtype=np.float64)
    places = (np.arange(width) + 0.5) / width
    shown = weights[np.searchsorted(at, places * samples, side="right") - 1].T
    counts = planned_counts(initial, planned, samples)
    lines = [
        (name, row, f"{count:.0f} samples") for name, row, count in zip(names, shown, counts, strict=True)
    ]
    if rates is not None:
        peak = rates.max()
        row = rates[(places * len(rates)).astype(int)] / (peak or 1.0)
        lines.append(("learning rate", row, f"peak {peak:g}"))
    longest = max(len(name) for name, *_ in lines)
    return [f"{name:<{longest}} |{_bars(row)}| {told}" for name, row, told in lines]


def _bars(shares) -> str:
    level = np.ceil(shares * (len(BARS) - 1) - TOLERANCE).astype(int).clip(0, len(BARS) - 1)
    return "".join(BARS[bar] for bar in level)
