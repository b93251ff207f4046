"""Study flow: runs spend their budgets in pairs, the study resumes, its tables against hand computation."""

import dataclasses
import json
import math

import markov_text
import numpy as np
import pytest
from markov_text import SMALL

from megatron_commute.experiments import bilingual, bilingual_flow
from megatron_commute.experiments import bilingual_flow_tables as tables
from megatron_commute.experiments.bilingual_flow import Case, flowing
from megatron_commute.experiments.bilingual_trainer import Settings, Text, Trainer


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(data=markov_text.write(tmp_path_factory.mktemp("text")), **{**SMALL, "heads": 2})


def size(*parts):
    return dataclasses.replace(bilingual_flow.QUICK, parts=parts, steps=10, lengths=(10, 20), long=20)


def test_the_trainer_takes_the_rates_of_the_run(settings):
    given = np.array([0.0, 1e-3, 5e-4])
    trainer = Trainer(settings, Text(settings), rates=given)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.step([0.5, 0.5])
    assert all((a == b).all() for a, b in zip(start, trainer.model.parameters(), strict=True))
    trainer.step([0.5, 0.5])
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-3
    assert trainer.rate(7) == 5e-4


def test_pieces_and_limits_of_a_domain(settings):
    whole = Text(settings)
    halves = Text(dataclasses.replace(settings, domains=("english:1/2", "english:2/2"), held=4, probe=4))
    sizes = [len(halves.train[name]) for name in halves.train if name.startswith("english")]
    assert sum(sizes) == len(whole.train["english"])
    last = halves.train["english:2/2"][sizes[1] - 1]["tokens"]
    assert (last == whole.train["english"][sum(sizes) - 1]["tokens"]).all()
    few = Text(settings, {"russian": 3})
    assert len(few.train["russian"]) == 3


def test_a_study_spends_budgets_resumes_and_redraws(settings, tmp_path):
    parts = size("target", "length", "epochs", "domains")
    said = []
    first = bilingual.study("flow", settings, tmp_path, True, 1, said.append, parts)
    cells = tmp_path / "flow" / "cells.jsonl"
    lines = cells.read_text().splitlines()
    assert len(said) == len(lines)
    for line in lines:
        cell = json.loads(line)
        assert sum(cell["served"]) == cell["steps"] * bilingual_flow.BATCH
    base, ours = (next(json.loads(line) for line in lines if name in line) for name in ("constant", "flow"))
    assert base["served"] == ours["served"]
    cells.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:30])
    said.clear()
    second = bilingual.study("flow", settings, tmp_path, True, 1, said.append, parts)
    assert len(said) == 1
    assert second["text"] == first["text"]
    assert all((tmp_path / "flow" / name).exists() for name in ("length.csv", "length.png", "domains.png"))
    bilingual.study(
        "flow", settings, tmp_path, True, 1, said.append, size("length")
    )  # other parts, one folder
    with pytest.raises(ValueError, match="parts=mian: write some of strength,target"):
        bilingual.study("flow", settings, tmp_path, True, 1, said.append, size("mian"))


def test_the_main_part_asks_every_schedule(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bilingual_flow, "STYLES", ("WSD",))
    found = bilingual.study("flow", settings, tmp_path, True, 1, lambda line: None, size("main"))
    assert all(name in found["text"] for name in ("best window", "tau-tail", "tilt", "odm", "late", "holm"))


def test_seeds_that_choose_read_other_text_than_those_that_report(settings):
    text = Text(settings)
    chosen, reported = (bilingual_flow.judging(text, "code", choosing) for choosing in (True, False))
    assert len(chosen) + len(reported) == len(text.valid["code"])
    data = [tuple(text.valid["code"][i]["tokens"].tolist()) for i in range(len(text.valid["code"]))]
    assert [tuple(row.tolist()) for row in (*chosen, *reported)] == data


def test_changes_and_intervals_by_hand():
    found = tables.change([2.0, 3.0, 4.5], [2.1, 3.2, 4.8])
    assert found["change"] == pytest.approx(-0.2)
    assert found["percent"] == pytest.approx(-100 * 0.2 / (10.1 / 3))
    assert found["interval"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)  # t(2), 95 %
    t = -0.2 / (0.1 / math.sqrt(3))
    assert found["worse"] == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)))  # closed form for 2 degrees


def test_holm_by_hand():
    assert tables.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_losses_by_hand():
    losses = {"a:1/2": 1.0, "a:2/2": 2.0, "b": 4.0, "other": 7.0}
    shares, target = {"a:1/2": 0.25, "a:2/2": 0.25, "b": 0.5}, np.array([0.5, 0.5, 0.0])
    expected = {"target": 1.5, "a": 1.5, "b": 4.0, "mixture": 2.75, "even": 7 / 3, "untrained": 7.0}
    for name, value in expected.items():
        assert tables.loss_of(losses, name, shares, target) == pytest.approx(value)


def test_keys_say_the_constants_of_a_schedule():
    """A default that changes must not take the cells of the old one."""
    case = flowing(Case("q", 0, "WSD", "", (1,), 500), memory=5.0, kept=20)
    assert "memory=5.0 kept=20" in case.key(1)
    assert case.key(1) != flowing(Case("q", 0, "WSD", "", (1,), 500), memory=2.5, kept=20).key(1)


def test_a_window_keeps_its_budget():
    shares, steps = np.array([0.6, 0.1, 0.3]), 100
    found = bilingual_flow.changes(
        "window", {"window": (0.5, 0.8, 3.0)}, np.ones(steps), None, shares, bilingual_flow.BATCH
    )
    ends = [*(sample for sample, _ in found[1:]), steps * bilingual_flow.BATCH]
    spent = sum((end - at) * w for (at, w), end in zip(found, ends, strict=True))
    assert spent == pytest.approx(steps * bilingual_flow.BATCH * shares)
    assert found[1][1][1] == pytest.approx(0.3)
