"""Law flow in the report: the planned weights at their samples, and the picture from the record alone."""

import re

import numpy as np
import records

from megatron_commute.report import plots, series


def test_planned_weights_hold_from_their_own_sample_on():
    lines = records.of_flow(records.lines(K=3))
    run = series.by_event(lines)
    sample, weights = series.weights(run)
    told = lines[0]["flow"]["segments"]
    places = np.searchsorted(told["sample"], sample, side="right") - 1
    assert np.array_equal(weights, np.array(told["weights"])[places])
    assert set(told["sample"]) <= set(sample.tolist())


def test_the_plan_of_a_stopped_run_shows_what_was_reached_only():
    lines = records.of_flow(records.lines(K=3))
    lines = [line for line in lines if line["event"] != "end" and (line.get("step") or 0) <= 100]
    run = series.by_event(lines)
    assert series.weights(run)[0].max() == 100 * 64
    assert len(series.planned(run)) == 25


def test_weights_that_people_wrote_end_the_plan():
    lines = records.of_flow(records.lines(K=3))
    wrote = {"schema": 1, "event": "control", "step": 200, "sample": 12800, "weights": [0.2, 0.3, 0.5]}
    run = series.by_event([*lines, wrote | {"effective_sample": 13000}])
    assert max(at for at, _ in series.planned(run)) < 13000 and len(series.planned(run)) == 13


def test_the_picture_has_rate_profile_and_weights_on_one_axis(tmp_path):
    lines = records.of_flow(records.lines(K=3))
    run = series.by_event(lines)
    picture = next(picture for picture in plots.pictures(run) if picture.name == "flow")
    rate, profile, weights = picture.figure.axes
    assert {axes.get_xlim() for axes in (rate, profile, weights)} == {rate.get_xlim()}
    assert weights.get_xlabel() == "samples (thousands)" and rate.get_xlabel() == ""
    assert rate.lines[0].get_ydata().max() == 1.0 and rate.get_ylabel() == "learning rate\n(10⁻³)"
    told = [
        p
        for n, p in zip(*map(lines[0]["flow"]["curves"].get, ("sample", "profile")), strict=True)
        if n >= 40 * 64
    ]
    assert profile.lines[1].get_ydata().tolist() == told
    planned = np.array(lines[0]["flow"]["segments"]["weights"])
    for k in range(3):
        x, y = weights.lines[k].get_data()
        assert x[-1] == 25.6 and np.array_equal(y[:-1], planned[:, k])
    words = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert words == list(run.names)
    assert (
        "the first 40 steps stay at the planned mixture" in picture.caption and "Markers" in picture.caption
    )
    page = plots.report(records.write(tmp_path, lines)).read_text(encoding="utf-8")
    assert re.search(r"<dt>law</dt><dd>flow</dd>", page) and 'id="flow"' in page


def test_a_run_of_another_law_has_no_such_picture():
    assert "flow" not in [picture.name for picture in plots.pictures(series.by_event(records.lines(K=2)))]
