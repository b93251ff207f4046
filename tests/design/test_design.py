"""The command `design` from a mixture file to a schedule that a run takes, and what it refuses."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from proxies import mixture_file

from megatron_commute.cli.main import main
from megatron_commute.design import run as work

RUN = "--seq-length 32 --global-batch-size 20 --micro-batch-size 20 --train-iters 200 --num-workers 0"
RATES = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10 --lr-decay-style WSD --lr-wsd-decay-iters 40"
PROXY = "layers=1,hidden=16,steps=60,batch=16,sequence=16,lr=0.01"


@pytest.fixture
def file(tmp_path, indexed_text):
    domains = {
        "a": (indexed_text("a", 3000), 3200, indexed_text("a_held")),
        "b": (indexed_text("b"), 800, indexed_text("b_held")),
    }
    return mixture_file(tmp_path, domains, target={"b": 1})


def design(file, out, *more, flags=f"{RUN} {RATES}"):
    words = ["design", str(file), *flags.split(), "--out", str(out), "--processes", "1", *more]
    return CliRunner().invoke(main, words)


@pytest.fixture
def two_looks(monkeypatch):
    monkeypatch.setattr(work.verify, "LOOKS", (2, 3))


def lines(out):
    found = {}
    for line in (out / "design.jsonl").read_text().splitlines():
        found.setdefault(json.loads(line)["event"], []).append(json.loads(line))
    return found


def test_a_design_from_beginning_to_end(file, tmp_path, two_looks):
    out = tmp_path / "out"
    told = design(file, out, "--proxy", PROXY, "--harm", "0.5", "--json")
    assert told.exit_code == 0, told.output
    found = lines(out)
    assert {"design", "influences", "outcome"} <= set(found)
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert (out / "schedule.csv").exists() == (found["outcome"][0]["outcome"] == "gain")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".csv", ".html")}
    cells = (out / "work" / "cells.jsonl").read_bytes()
    again = design(file, out, "--proxy", PROXY, "--harm", "0.5", "--json")
    assert again.exit_code == 0
    assert (out / "work" / "cells.jsonl").read_bytes() == cells  # nothing was run twice
    after = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".csv",)}
    assert after == {name: before[name] for name in after}


def test_a_killed_design_goes_on_to_the_same_numbers(file, tmp_path, two_looks):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert design(file, whole, "--proxy", PROXY).exit_code == 0
    cells = (whole / "work" / "cells.jsonl").read_text()
    (torn / "work").mkdir(parents=True)
    (torn / "work" / "cells.jsonl").write_text(cells[: len(cells) // 2])  # in the middle of a line
    assert design(file, torn, "--proxy", PROXY).exit_code == 0
    assert (torn / "design.csv").read_bytes() == (whole / "design.csv").read_bytes()
    for a, b in zip(*((d / "design.jsonl").read_text().splitlines() for d in (whole, torn)), strict=True):
        a, b = json.loads(a), json.loads(b)
        for line in (a, b):
            line.pop("timing", None)
        assert a == b


@pytest.mark.parametrize("road", ["flow", "free"])
def test_the_schedule_is_one_that_a_run_takes(file, tmp_path, two_looks, monkeypatch, road):
    """Its steps are no multiple of the proxy's, and its budgets are met all the same."""
    monkeypatch.setattr(work.verify, "verdict", lambda *_: work.verify.GAIN)
    monkeypatch.setattr(work.plan, "strength_within", lambda *_: (1.0, -0.1))
    if road == "free":
        monkeypatch.setattr(work.plan, "of_flow", lambda *_: None)
    content = json.loads(file.read_text())
    content["domains"]["a"]["budget"] = 2940
    file.write_text(json.dumps(content))
    out, run = tmp_path / "out", RUN.replace("--train-iters 200", "--train-iters 187")
    told = design(file, out, "--proxy", PROXY, flags=f"{run} {RATES}")
    assert told.exit_code == 0, told.output
    assert [line["road"]["name"] for line in lines(out)["road"] if line["chosen"]] == [road]
    file.write_text(json.dumps(content | {"schedule": str(out / "schedule.csv")}))
    told = CliRunner().invoke(main, ["plan", str(file), *run.split(), "--json"])
    assert told.exit_code == 0, told.output
    changes = json.loads(told.output)["schedule"]
    samples = np.diff([at for at, _ in changes] + [3740])
    weights = np.array([w for _, w in changes])
    np.testing.assert_allclose(samples @ weights, [2940, 800], atol=1e-6)
    proven = np.array(lines(out)["proof"][-1]["weights"])
    np.testing.assert_allclose(np.ptp(weights, axis=0), np.ptp(proven, axis=0), rtol=0.1)


REFUSALS = [
    ({}, ["--proxy", "steps=60,width=3"], "write NAME=VALUE with one of"),
    ({}, ["--proxy", "steps=many"], "write a whole number for steps"),
    ({}, ["--proxy", "heads=5"], "write a multiple of 2 x heads"),
    ({}, ["--proxy", "steps=100000,batch=64"], "write --proxy steps="),
    ({}, ["--proxy", "flavour=bert"], "write gpt2 or llama"),
    ({}, ["--harm", "-1"], "write a part of the loss above 0"),
    ({}, ["--untrained", "x"], "write NAME=PREFIX"),
    ({"target": "each"}, [], "write shares of the domains"),
    ({}, ["--from", "run/global_step10"], "plan by the law alone (--law flow)"),
]


@pytest.mark.parametrize(("keys", "more", "cure"), REFUSALS)
def test_bad_input_is_refused_before_anything_trains(file, tmp_path, keys, more, cure):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    told = design(file, tmp_path / "out", *more)
    assert told.exit_code == 2 and cure in told.output and len(told.output.splitlines()) == 1, told.output
    assert not (tmp_path / "out").exists()


def test_one_domain_has_no_order(tmp_path, indexed_text):
    path = mixture_file(tmp_path, {"a": (indexed_text("a"), 4000, indexed_text("a_held"))})
    told = design(path, tmp_path / "out")
    assert told.exit_code == 2 and "one domain" in told.output


def test_a_holdout_too_small_to_judge(tmp_path, indexed_text):
    domains = {
        "a": (indexed_text("a", 3000), 3200, indexed_text("a_held", 30)),
        "b": (indexed_text("b"), 800, indexed_text("b_held")),
    }
    file = mixture_file(tmp_path, domains, target={"b": 1}, probe={"samples": 8, "splits": 2})
    told = design(file, tmp_path / "out", "--proxy", "steps=60")
    assert told.exit_code == 2 and "raise its holdout to" in told.output


def test_another_design_needs_another_folder(file, tmp_path, two_looks):
    assert design(file, tmp_path / "out", "--proxy", PROXY).exit_code == 0
    told = design(file, tmp_path / "out", "--proxy", f"{PROXY},clip=2")
    assert told.exit_code == 2 and "give another folder" in told.output


def test_a_diverging_proxy_is_named(file, tmp_path):
    told = design(file, tmp_path / "out", "--proxy", f"{PROXY},clip=1e30".replace("lr=0.01", "lr=1e20"))
    assert told.exit_code == 2 and "lower its rate" in told.output, told.output


def test_flags_of_a_host_stand_for_those_not_given(file, tmp_path, two_looks):
    flags = {
        word.lstrip("-").replace("-", "_"): value
        for word, value in zip(*[iter(f"{RUN} {RATES}".split())] * 2, strict=True)
    }
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps({**flags, "unknown": 3}))
    told = design(file, tmp_path / "out", "--arguments", str(path), "--law", "flow", flags="")
    assert told.exit_code == 0, told.output
    path.write_text(json.dumps({**flags, "finetune": True}))
    for words in (["--law", "flow", "--from", "x"], ["--arguments", str(path)]):
        more = ["--arguments", str(path), *words] if "--law" in words else words
        told = design(file, tmp_path / "out3", *more, flags="")
        assert told.exit_code == (0 if "--law" in words else 2), told.output
    assert "proxies begin from new weights" in told.output
    path.write_text("[1]")
    told = design(file, tmp_path / "out2", "--arguments", str(path), "--law", "flow", flags="")
    assert told.exit_code == 2 and "no JSON object" in told.output
