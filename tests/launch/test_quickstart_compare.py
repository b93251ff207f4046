"""The quickstart's table of two runs: numbers worked out by hand, and what cannot be compared."""

import json
import sys
from pathlib import Path

import pytest
import records

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "tests" / "bench")]

import quickstart_compare
import quickstart_mixture
import quickstart_pairs


def run(folder, valid, budgets=(300, 100), end=True):
    start = {"event": "start", "names": ["en", "ru"], "budgets": list(budgets), "samples": 400, "seq_length": 8,
             "global_batch": 4, "target": [0.0, 1.0]}  # fmt: skip
    lines = [start, {"event": "loss", "step": 50, "sample": 200, "valid": {"en": 9.0, "ru": 9.0}}]
    lines.append({"event": "loss", "step": 100, "sample": 400, "valid": valid})
    lines += [{"event": "end", "step": 100, "sample": 400}] if end else []
    records.write(folder, [{"schema": 1, **line} for line in lines])
    return str(folder)


def test_last_losses_stand_side_by_side_with_the_difference_in_percent(tmp_path, capsys):
    one = run(tmp_path / "flow", {"en": 4.02, "ru": 4.75})
    two = run(tmp_path / "hold", {"en": 4.0, "ru": 5.0})
    assert quickstart_compare.main([one, two]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[0] == ["en", "0.75", "0.00", "4.0200", "4.0000", "+0.50", "%"]
    assert rows[1] == ["ru", "0.25", "1.00", "4.7500", "5.0000", "-5.00", "%"]
    assert rows[2] == ["training", "mixture", "1.00", "4.2025", "4.2500", "-1.12", "%"]
    assert quickstart_compare.main([one, two, "--json"]) == 0
    assert [row["domain"] for row in json.loads(capsys.readouterr().out)] == ["en", "ru", "training mixture"]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"end": False}, "not a finished run with validation losses; train it to its end"),
        ({"budgets": (200, 200)}, "compare runs of equal data"),
        ({"valid": None}, "hold"),
    ],
)
def test_runs_that_cannot_be_compared_end_with_one_line(tmp_path, capsys, other, told):
    one = run(tmp_path / "flow", {"en": 4.0, "ru": 5.0})
    two = (
        run(tmp_path / "hold", **{"valid": {"en": 4.0, "ru": 5.0}, **other})
        if other != {"valid": None}
        else "hold"
    )
    assert quickstart_compare.main([one, two]) == 2
    said = capsys.readouterr().err
    assert told in said and said.startswith("error: ") and said.count("\n") == 1


def test_the_constant_mixture_has_the_same_data_and_no_probes(tmp_path, capsys):
    (tmp_path / "data.json").write_text(
        json.dumps({"domains": {key: {} for key in ("english", "russian", "code")}})
    )
    size = ["--train-iters", "500", "--global-batch-size", "16", "--data", str(tmp_path)]
    for law in ("flow", "hold"):
        assert (
            quickstart_mixture.main(
                [*size, "--law", law, "--seed", "7", "--out", str(tmp_path / f"{law}.yaml")]
            )
            == 0
        )
    flow, hold = ((tmp_path / f"{law}.yaml").read_text() for law in ("flow", "hold"))
    changed = [pair for pair in zip(flow.splitlines(), hold.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [b.split("#")[0].strip() for _, b in changed] == ["every: 500", "law: hold"] and "seed: 7" in flow


def test_the_front_page_tells_what_the_pairs_say():
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = {(row["decay"], row["domain"]): row for row in quickstart_pairs.summary(quickstart_pairs.kept())}
    for decay, words in (("cosine", "lower under a cosine"), ("WSD", "under WSD")):
        row = found[decay, "russian"]
        assert row["pairs"] == 5 and f"{-row['percent']:.1f} ± {row['half']:.1f} % {words}" in page
    others = [row["percent"] for (_, domain), row in found.items() if domain in ("english", "code")]
    assert "English and code at most 0.3 % higher" in page and 0 < max(others) < 0.35
