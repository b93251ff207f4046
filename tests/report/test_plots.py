"""Series, summary, pictures and exports against the record itself, read here without the code under test."""

import csv
import re

import numpy as np
import pytest
import records

from megatron_commute.record import log as record
from megatron_commute.report import page as report
from megatron_commute.report import plots, series, tables


def run_of(**options):
    return series.by_event(records.lines(**options))


@pytest.mark.parametrize("K", [2, 3, 8])
def test_weights_in_force_add_up_to_the_samples_served(K):
    lines = records.lines(K=K, seed=K)
    sample, weight = series.weights(series.by_event(lines))
    assert len(sample) > 40 and (np.diff(sample) > 0).all()
    edges = np.append(sample, lines[-1]["sample"])
    drawn = (np.diff(edges)[:, None] * weight).sum(0)
    assert np.abs(drawn - list(lines[-1]["served"].values())).max() < 2  # rounding of whole samples


def test_a_decision_shows_at_its_sample_and_not_before():
    lines = [line for line in records.lines() if line["event"] in ("start", "probe", "end")]
    moved = [line for line in lines if line.get("effective_sample")]
    sample, weight = series.weights(series.by_event(lines))
    reached = [line for line in moved if line["effective_sample"] <= lines[-1]["sample"]]
    assert 2 <= len(reached) < len(moved)
    assert sample.tolist() == [0, *(line["effective_sample"] for line in reached)]
    assert weight.tolist() == [lines[0]["weights"], *(line["weights_next"] for line in reached)]


def test_summary_of_a_run():
    lines = records.lines(K=3, endless=(2,))
    headers, rows = plots.summary_rows(lines)
    losses = [line for line in lines if line["event"] == "loss"]
    valid = [line["valid"]["english"] for line in losses if "valid" in line]
    probe = [line for line in lines if line["event"] == "probe"][-1]
    row = dict(zip(headers, rows[0], strict=True))
    assert [r[0] for r in rows] == lines[0]["names"]
    assert (
        row["training loss"] == f"{losses[0]['train']['english']:.3f} → {losses[-1]['train']['english']:.3f}"
    )
    assert row["validation loss"] == f"{valid[0]:.3f} → {valid[-1]:.3f}"
    assert row["weight"] == f"{lines[0]['weights'][0]:.3f} → {losses[-1]['weights']['english']:.3f}"
    assert row["samples used / budget"] == "{0:,} / {0:,}".format(lines[-1]["served"]["english"])
    assert rows[2][4].endswith("/ no budget")
    shown, error = map(float, row["score (10⁻³)"].replace("−", "-").split(" ± "))
    assert shown == pytest.approx(1e3 * probe["score"][0], abs=0.006)
    assert error == pytest.approx(1e3 * probe["score_se"][0], abs=0.006)
    for k in range(3):
        largest = max(range(3), key=lambda j: abs(probe["P"][k][j]))
        value, partner = rows[k][-1].split(" with ")
        assert partner == lines[0]["names"][largest]
        assert float(value.split()[0].replace("−", "-")) == pytest.approx(
            1e3 * probe["P"][k][largest], abs=0.006
        )


def test_summary_without_probes_losses_or_budgets():
    start = records.lines(K=2, endless=(0, 1))[0]
    _, rows = plots.summary_rows([start])
    assert [set(row[1:3]) for row in rows] == [{"not recorded"}] * 2
    assert [set(row[5:]) for row in rows] == [{"not measured"}] * 2
    assert len(report.lacks(series.by_event([start]))) == 5
    drawn = plots.pictures(series.by_event([start]))
    assert [picture.name for picture in drawn] == ["weights"]


def test_numbers_without_an_error_are_never_certain():
    run = run_of()
    value = np.array([1.0, 1.0, 1.0, np.nan])
    error = np.array([np.nan, 0.5, 0.1, 0.1])
    assert series.certain(run, value, error).tolist() == [False, False, True, False]  # 3 degrees: 3.18 errors
    assert series.certain(run, value, error, probes=100).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    "options, names",
    [
        ({"K": 2}, {"P", "scores"}),
        ({"K": 3}, {"P_last", "P_mean", "scores"}),
        ({"K": 2, "each": True}, {"P", "scores_1", "scores_2"}),
        ({"K": 3, "each": True}, {f"{n}_{t}" for n in ("P_last", "P_mean", "scores") for t in (1, 2, 3)}),
        ({"K": 1}, {"scores"}),
    ],
)
def test_pictures_of_every_shape(options, names):
    drawn = plots.pictures(run_of(**options))
    assert {picture.name for picture in drawn} == names | {"weights", "losses", "budgets", "overhead"}
    for picture in drawn:
        axes = picture.figure.get_axes()
        assert axes[0].get_ylabel() or picture.figure.get_supylabel()
        assert any("samples (thousands)" in a.get_xlabel() for a in axes) or "P_" in picture.name
        assert ("rror" in picture.caption) == picture.name.startswith(("P", "scores"))


def test_heat_map_prints_p_of_the_last_probe_with_first_in_rows():
    lines = records.lines(K=3)
    P = np.array([line for line in lines if line["event"] == "probe"][-1]["P"])
    by_name = {picture.name: picture for picture in plots.pictures(series.by_event(lines))}
    axes = by_name["P_last"].figure.get_axes()[0]
    shown = {text.get_position(): text.get_text().split("\n")[0] for text in axes.texts}
    assert len(shown) == 6
    for (x, y), number in shown.items():
        assert float(number.replace("−", "-")) == pytest.approx(1e3 * P[int(y), int(x)], abs=0.051)
    assert axes.yaxis_inverted() and axes.get_ylabel() == "first"


def test_scores_over_many_orders_of_magnitude_stay_readable():
    lines = records.lines(K=3)
    for line in lines:
        if line["event"] == "probe" and line["step"] > 300:
            line["score"] = [1e4 * value for value in line["score"]]
    drawn = {picture.name: picture for picture in plots.pictures(series.by_event(lines))}
    axes = drawn["scores"].figure.get_axes()[0]
    assert axes.get_yscale() == "symlog" and "logarithmic" in drawn["scores"].caption
    drawn["scores"].svg()
    shown = [tick for tick in axes.get_yticks() if np.prod(np.subtract(axes.get_ylim(), tick)) <= 0]
    assert 3 <= len(shown) <= 9


def test_the_same_record_gives_the_same_bytes(tmp_path):
    record = records.write(tmp_path, records.lines(K=3))
    first = plots.report(record, tmp_path / "a.html").read_bytes()
    assert plots.report(tmp_path, tmp_path / "deep" / "b.html").read_bytes() == first
    assert plots.report(record) == tmp_path / "report.html"


def test_export_writes_every_picture_and_every_number(tmp_path):
    lines = records.lines(K=3, skips=(1,))
    written = plots.export(records.write(tmp_path, lines), tmp_path / "out")
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    assert {p.stem for p in written if p.suffix == ".svg"} == {p.stem for p in written if p.suffix == ".png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written if path.suffix == ".png")
    probes = [line for line in lines if line["event"] == "probe"]
    rows = read_csv(tmp_path / "out" / "P.csv")
    assert len(rows) == 6 * len(probes)
    names = lines[0]["names"]
    for row in rows:
        probe = next(line for line in probes if line["sample"] == int(row["sample"]))
        i, j = names.index(row["first"]), names.index(row["second"])
        assert float(row["value"]) == probe["P"][i][j]
        assert float(row["standard_error"]) == probe["P_se"][i][j]
    served = read_csv(tmp_path / "out" / "served.csv")
    assert {name: float(served[-1][name]) for name in names} == lines[-1]["served"]
    assert read_csv(tmp_path / "out" / "skips.csv")[0]["reason"] == "loss of code is not finite on rank 1"
    decided = read_csv(tmp_path / "out" / "decisions.csv")
    assert [row["effective_sample"] for row in decided] == [str(p["effective_sample"] or "") for p in probes]


def test_the_weights_of_an_analysis_are_those_of_its_checkpoints_and_go_on_to_the_end_of_the_run():
    lines = records.analysed(records.lines(K=3))
    cut = [line for line in lines if line.get("step", 0) <= 200]  # checkpoints of the first half only
    run = series.by_event(cut)
    picture = plots.pictures(run)[0]
    assert picture.name == "weights" and run.span == lines[0]["samples"] > run.samples
    for k, own in enumerate(picture.figure.get_axes()[0].lines[:3]):
        assert 1000 * own.get_xdata()[-1] == run.span
        held = [line["weights"][k] for line in cut if line["event"] == "probe"]
        assert own.get_ydata().tolist()[1:-1] == held


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_names_survive_the_rules_of_the_picture_library():
    names = ["_hidden", "a$b$_c", "a name that is far too long for a legend"]
    svg = plots.pictures(run_of(names=names))[0].svg()
    shown = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert "_hidden" in shown and "a$b$_c" in shown and "a name that is fa…" in shown


def test_a_record_without_a_start_names_the_file(tmp_path):
    record = records.write(tmp_path, records.lines()[1:])
    with pytest.raises(ValueError, match=r"commute.jsonl.*no start line.*--commute"):
        plots.report(record)
    with pytest.raises(FileNotFoundError, match="no decision log"):
        plots.report(tmp_path / "elsewhere")


def test_a_long_record_is_thinned_for_its_page_and_whole_in_the_export(tmp_path):
    lines = records.lines(K=2, steps=30_000, log_every=5, probe_every=10)
    path = plots.report(records.write(tmp_path, lines))
    run = plots.shortened(record.find(tmp_path))
    probes = [line for line in lines if line["event"] == "probe"]
    losses = [line for line in lines if line["event"] == "loss"]
    assert len(run.probes) <= 1601 and len(run.losses) <= 4002
    assert run.count("probe", run.probes) == len(probes) and run.count("loss", run.losses) == len(losses)
    assert (run.probes[0], run.probes[-1]) == (probes[0], probes[-1]) and run.losses[-1] == losses[-1]
    assert series.summary_rows(run)[1] == series.summary_rows(lines)[1]
    text = path.read_text()
    assert path.stat().st_size < 5e6 and f"{len(probes):,} finished" in text
    assert f"of the {len(losses):,} loss lines, evenly spaced; --export writes all of them" in text
    assert len(tables.tables(plots._whole(tmp_path))["train_loss"][1]) == len(losses)


def test_a_short_record_is_not_thinned(tmp_path):
    lines = records.lines()
    run = plots.shortened(record.find(records.write(tmp_path, lines)))
    assert run.losses == [line for line in lines if line["event"] == "loss"] and "evenly" not in str(
        run.notes
    )
