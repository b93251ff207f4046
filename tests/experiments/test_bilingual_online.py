"""Study online: it runs, resumes and redraws; the second half is the product's, and windows spend what is left."""

import dataclasses

import markov_text
import numpy as np
import pytest
import torch

from megatron_commute.experiments import (
    bilingual,
    bilingual_criterion,
    bilingual_memory,
    bilingual_online,
    bilingual_online_run,
)
from megatron_commute.experiments import bilingual_online_tables as tables
from megatron_commute.experiments.bilingual_trainer import Settings
from megatron_commute.mixture import Mixture


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    markov_text.write(folder, train=200, valid=100)
    return Settings(data=str(folder), sequence=8, vocabulary=markov_text.VOCABULARY, hidden=16)


def test_a_study_resumes_and_redraws(settings, tmp_path, monkeypatch):
    few = {"styles": ("WSD",), "changes": ("mixture>russian",)}
    for name, value in (("STYLES", ("WSD",)), ("SEEDS", (101,)), ("POINTS", (0.5,)), ("STEPS", 2)):
        monkeypatch.setattr(bilingual_memory, name, value)
    monkeypatch.setattr(bilingual_criterion, "READ", 8)
    size, said = dataclasses.replace(bilingual_online.QUICK, steps=24, **few), []
    first = bilingual.study("online", settings, tmp_path, True, 1, said.append, size)
    assert len(said) == 2 + 2 + 2 * 2 + 2
    for name in ("target.csv", "target.png", "grid.csv", "length.csv", "length.png", "memory.csv"):
        assert (tmp_path / "online" / name).exists()
    said.clear()
    again = bilingual.study("online", settings, tmp_path, True, 1, said.append, size)
    assert not said and again["text"] == first["text"]
    with pytest.raises(ValueError, match="parts=mian: write some of target"):
        wrong = dataclasses.replace(size, parts=("mian",))
        bilingual.study("online", settings, tmp_path, True, 1, said.append, wrong)


def test_a_target_of_its_own_memory_beside_the_law(settings, tmp_path):
    few = {"parts": ("target",), "styles": ("WSD",), "changes": ("russian>code",)}
    size = dataclasses.replace(bilingual_online.QUICK, steps=24, **few)
    bilingual.study("online", settings, tmp_path, True, 1, lambda line: None, size)
    table = (tmp_path / "online" / "target.csv").read_text().splitlines()
    rows = [line.split(",") for line in table[1:]]
    told = {row[3]: float(row[7]) for row in rows if row[4] == "code"}
    assert [*told][::2] == ["flow", "own memory: 8.4"]
    assert told["flow"] != told["own memory: 8.4"]


def test_a_window_spends_what_is_left(settings):
    steps, shares = 40, bilingual_online_run.SHARES
    budgets = bilingual_online_run.budgets_of(steps)
    mixture = Mixture(shares, budgets, samples=steps * bilingual_online_run.BATCH)
    mixture.skip(20 * bilingual_online_run.BATCH)
    rows = bilingual_online_run.window_rows((0.2, 0.8), mixture, 1, steps)
    ends = [*(row[0] for row in rows[1:]), steps * bilingual_online_run.BATCH]
    spent = sum((end - row[0]) * np.array(row[1:]) for row, end in zip(rows, ends, strict=True))
    assert spent == pytest.approx(np.array(budgets) - mixture.served, abs=1e-6)
    inside = (ends[1] - rows[1][0]) * rows[1][2]
    assert inside == pytest.approx(0.9 * (budgets[1] - mixture.served[1]))


def test_the_part_of_a_gain_by_hand():
    found, interval = tables.ratio([1.0, 2.0, 3.0], [2.0, 5.0, 5.0])
    assert found == pytest.approx(0.5)
    deviations = np.array([0.0, -0.5, 0.5])  # of 1 - r 2, 2 - r 5, 3 - r 5
    assert interval == pytest.approx(4.302653 * deviations.std(ddof=1) / np.sqrt(3) / 4, rel=1e-6)


def test_lanczos_on_a_quadratic_is_exact():
    """After as many steps as there are curvatures: g . exp(-t B) g / g . g of a diagonal B, by its definition."""
    curvatures = torch.tensor([-0.5, 0.2, 1.0, 3.0, 9.0], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    found = bilingual_memory.lanczos(lambda v: curvatures * v, g, 9)
    assert len(found) == 5
    expected = float(g**2 @ torch.exp(-0.7 * curvatures) / (g @ g))
    nodes, weights = found[-1]
    assert weights @ np.exp(-0.7 * nodes) == pytest.approx(expected, rel=1e-9)
    assert bilingual_memory.memory(nodes, weights, 0.7, 2.1) == pytest.approx(-3 * np.log(expected), rel=1e-9)
    first = float(g**2 @ curvatures / (g @ g))  # one step: the Rayleigh quotient
    assert bilingual_memory.memory(*found[0], 0.7, 2.1) == pytest.approx(2.1 * first, rel=1e-9)
