"""Schedules from a file: what is read, what the mixture follows, and what is refused."""

import numpy as np
import pytest

from megatron_commute.mixture import Mixture
from megatron_commute.settings import schedule
from megatron_commute.settings.batches import Batches

NAMES = ["en", "de"]


@pytest.fixture
def written(tmp_path):
    def write(text, samples=1000, seq_length=512):
        path = tmp_path / "schedule.csv"
        path.write_text(text, encoding="utf-8")
        return schedule.read(path, NAMES, samples, seq_length)

    return write


def test_points_in_samples_tokens_and_parts(written):
    points = written(
        "at,then,de,en\n0,linear,0.25,0.75\n102.4ktok,cosine,0.5,0.5\n33.35%,,0,1\n1000, hold,1,0\n"
    )
    assert [(p.sample, p.then, p.weights.tolist()) for p in points] == [
        (0, "linear", [0.75, 0.25]),
        (200, "cosine", [0.5, 0.5]),
        (334, "hold", [1.0, 0.0]),
        (1000, "hold", [0.0, 1.0]),
    ]


@pytest.mark.parametrize("rounded", ["0.33334,0.66667", "0.333,0.666", "0.49999,0.5", "3.3334e-1,0.66667"])
def test_weights_rounded_to_their_digits_are_scaled_to_1(written, rounded):
    (point,) = written(f"sample,en,de\n0,{rounded}\n")
    one, two = (float(text) for text in rounded.split(","))
    assert one + two != 1 and point.weights.sum() == pytest.approx(1, abs=1e-15)
    assert point.weights[0] / point.weights[1] == pytest.approx(one / two, rel=1e-15)


@pytest.mark.parametrize("wrong", ["0.33334,0.66668", "0.3,0.6", "0.51,0.5", "0.333333,0.66666"])
def test_a_sum_beyond_rounding_is_refused_and_told(written, wrong):
    total = sum(float(text) for text in wrong.split(","))
    with pytest.raises(ValueError, match=rf":2: weights \[.*\] sum to {total:.6g}; write numbers >= 0"):
        written(f"sample,en,de\n0,{wrong}\n")


def test_the_plain_table_of_samples_is_a_schedule(written):
    points = written("sample,en,de\n0,0.5,0.5\n300,1,0\n")
    assert schedule.changes(points, Batches(8))[0][0] == 0
    assert [(at, w.tolist()) for at, w in schedule.changes(points, Batches(8))] == [
        (0, [0.5, 0.5]),
        (304, [1.0, 0.0]),
    ]


@pytest.mark.parametrize("way", ["linear", "cosine"])
@pytest.mark.parametrize("global_batch", [1, 32, 300])
@pytest.mark.parametrize("stairs", [1, 7, 100])
def test_a_ramp_serves_the_samples_under_its_curve(written, way, global_batch, stairs):
    """The integral of the curve by the midpoint rule, on a grid a hundred times finer than the samples."""
    length = 9600
    points = written(f"at,then,en,de\n0,{way},0.9,0.1\n{length},hold,0.2,0.8\n", samples=2 * length)
    u = (np.arange(100 * length) + 0.5) / (100 * length)
    curve = 0.9 - 0.7 * (u if way == "linear" else np.sin(np.pi * u / 2) ** 2)
    want = curve.mean() * length + 0.2 * length
    planned = schedule.changes(points, Batches(global_batch), stairs)
    assert all(at % global_batch == 0 for at, _ in planned) and len(planned) <= stairs + 1
    assert schedule.planned_counts([0.5, 0.5], planned, 2 * length)[0] == pytest.approx(want, abs=1e-3)
    stream = Mixture([0.5, 0.5], samples=2 * length)
    for at, weights in planned:
        stream.schedule(weights, at)
    for at, served in ((length, curve.mean() * length), (2 * length, want)):
        stream.skip(at - stream.index)
        assert stream.served[0] == pytest.approx(served, abs=1.001)


def test_a_ramp_that_ends_inside_a_global_batch_stops_there(written):
    planned = schedule.changes(written("at,then,en,de\n0,linear,0,1\n100,hold,1,0\n"), Batches(64))
    assert [at for at, _ in planned] == [0, 64, 128]
    assert [weights[0] for _, weights in planned] == pytest.approx([0.32, 0.82, 1.0])


def test_before_the_first_point_the_runs_own_weights_hold(written):
    planned = schedule.changes(written("at,en,de\n50%,1,0\n"), Batches(10))
    assert schedule.planned_counts([0.2, 0.8], planned, 1000).tolist() == [600, 400]
    assert schedule.planned_counts([0.2, 0.8], planned, 400).tolist() == [80, 320]


@pytest.mark.parametrize(
    "text,cure",
    [
        ("", r":1: the columns are missing; write at,then,en,de"),
        ("at,en,de\n", "no points; write a row such as 0,hold,0.5,0.5"),
        ("at,en,de\n0,1\n", ":2: the row has not as many columns"),
        ("at,en,de\n0,x,1\n", ":2: .*write a number for each domain"),
        ("at,en,de\n0,0.5,0.4\n", r":2: weights \[0.5, 0.4\] sum to 0.9; write numbers >= 0 that sum to 1"),
        ("at,en,de\n0,nan,1\n", ":2: nan is no number; write a number for each domain"),
        ("at,then,en,de\n0,jump,0,1\n", "then: jump; write one of hold, linear, cosine"),
        ("at,en,de\n0,0,1\n0%,1,0\n", ":3: 0% is sample 0; write points that rise"),
        ("at,en,de\n2.5,0,1\n", "'2.5' is no point of a run; write samples"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_line(written, text, cure):
    with pytest.raises(ValueError, match=cure):
        written(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"nowhere.csv: cannot be read: No such file or directory; name a CSV file"
    ):
        schedule.read(tmp_path / "nowhere.csv", NAMES, 10, 1)


def test_the_drawing_shows_every_domain_and_its_samples(written):
    planned = schedule.changes(written("at,en,de\n0,0.5,0.5\n50%,0,1\n"), Batches(10))
    assert schedule.drawing(NAMES, [1, 0], planned, 1000, width=4) == [
        "en |▄▄  | 250 samples",
        "de |▄▄██| 750 samples",
    ]
