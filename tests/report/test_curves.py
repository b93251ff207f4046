"""Every series of the report is a curve of TensorBoard too: both are listed here, and no series may be missing on either."""

import pytest
import records

from megatron_commute.report import curves, series
from megatron_commute.report.tables import tables

# what the report shows in words, or once for the whole run, and TensorBoard therefore does not
WORDS = {"decisions", "skips", "interventions", "summary"}
KINDS = {"train_loss": "train", "valid_loss": "valid", "served": "served", "budget_left": "budget_left"}
OVERHEAD = {"fraction_of_training_time": "overhead", "probe_seconds": "probe_seconds"}


def drawn(lines):
    """{(curve, sample): number} of a whole record."""
    names, budgets = lines[0]["names"], lines[0]["budgets"]
    return {
        (name, line["sample"]): value for line in lines for name, value in curves.of(line, names, budgets)
    }


def expected(run, name, headers, row):
    """[(curve, sample, value)] that a row of a table stands for."""
    cells = dict(zip(headers, row, strict=True))
    sample = cells.get("sample")
    if name in KINDS:
        return [(f"{KINDS[name]}/{n}", sample, cells[n]) for n in run.names] if sample else []
    if name == "weights":
        probe = [p for p in run.probes if p["effective_sample"] == sample]
        at, kind = (probe[0]["sample"], "weights_next") if probe else (sample, "weights")
        return [(f"{kind}/{n}", at, cells[n]) for n in run.names] if sample else []
    if name == "overhead":
        return [(curve, sample, cells[key]) for key, curve in OVERHEAD.items()]
    places = [cells[key] for key in ("first", "second", "domain") if key in cells]
    if name == "P" and run.names.index(places[0]) > run.names.index(places[1]):
        return []  # the same number with the other sign
    where = "/".join([*([cells["target"]] if len(run.targets) > 1 else []), *places])
    return [
        (f"{name}/{where}", sample, cells["value"]),
        (f"{name}_se/{where}", sample, cells["standard_error"]),
    ]


@pytest.mark.parametrize("options", [{"K": 3, "endless": (1,)}, {"K": 3, "each": True, "mode": "shadow"}])
def test_every_series_of_the_report_is_a_curve_with_the_same_numbers(options):
    lines = records.lines(**options)
    run, found = series.by_event(lines), drawn(lines)
    seen = set()
    for name, (headers, rows) in tables(run).items():
        if name in WORDS:
            continue
        seen.add(name)
        for row in rows:
            for curve, sample, value in expected(run, name, headers, row):
                if value == value:  # NaN: not recorded
                    assert found[curve, sample] == value, (curve, sample)
    assert seen == {*KINDS, "weights", "overhead", "score", "s", "P"}


def test_numbers_that_are_not_are_left_out():
    line = {"event": "loss", "step": 3, "sample": 9, "train": {"a": 2.0, "b": None}, "served": {"a": 5, "b": 4}, "lr": 0.1,
            "weights": {"a": 0.5, "b": 0.5}}  # fmt: skip
    told = dict(curves.of(line, ["a", "b"], [10, None]))
    assert told == {"train/a": 2.0, "served/a": 5, "served/b": 4, "weights/a": 0.5, "weights/b": 0.5,
                    "budget_left/a": 5, "learning_rate": 0.1}  # fmt: skip
    line["timing"] = {"step_seconds": 0.5, "probe_seconds": 7.0}
    assert curves.of(line, ["a", "b"], [10, None])[-1] == ("step_seconds", 0.5)
    probe = {"event": "probe", "s": [float("nan"), 1.0], "timing": {"probe_seconds": 2.0, "overhead": None}}
    assert curves.of(probe, ["a", "b"], [None, None]) == [("s/b", 1.0), ("probe_seconds", 2.0)]
    assert curves.of({"event": "start", "names": ["a"], "weights": [1.0]}, ["a"], [None]) == []


def test_a_writer_that_fails_is_told_of_nothing_more_and_nobody_else_notices():
    told, said = [], []

    def listen(line):
        told.append(line)
        raise OSError("no space left")

    tell = curves.safe(listen, said.append)
    tell({"event": "loss"})
    tell({"event": "probe"})
    assert told == [{"event": "loss"}]
    assert said == ["commute: no more scalars, the writer failed: OSError: no space left"]
