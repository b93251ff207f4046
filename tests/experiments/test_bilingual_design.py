"""Study design: it runs, resumes and redraws; law flow in it is the product's own."""

import dataclasses
import json

import markov_text
import numpy as np
import pytest

from megatron_commute.experiments import bilingual, bilingual_design, bilingual_targets
from megatron_commute.experiments.bilingual_trainer import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    markov_text.write(folder, train=200, valid=60)
    return Settings(data=str(folder), sequence=8, vocabulary=markov_text.VOCABULARY)


def size(*parts):
    return dataclasses.replace(bilingual_design.QUICK, parts=parts, steps=12, lengths=(12,))


def test_a_study_resumes_and_redraws(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bilingual_design, "STYLES", ("WSD", "cosine"))
    monkeypatch.setattr(bilingual_design, "PEAKS", (1e-3,))
    for name, value in (("MIXTURES", ("base",)), ("MEMORIES", (2.5, 5.0)), ("CHOOSING", (101, 102))):
        monkeypatch.setattr(bilingual_targets, name, value)
    monkeypatch.setattr(bilingual_targets, "TARGETS", {"code": bilingual_targets.TARGETS["code"]})
    parts = size(*(part for part in bilingual_design.PARTS if part not in ("length", "size")))
    said = []
    first = bilingual.study("design", settings, tmp_path, True, 1, said.append, parts)
    for name in ("main.csv", "main.png", "memory.csv", "averaging.png", "folding.csv", "curvature.csv"):
        assert (tmp_path / "design" / name).exists()
    for name in ("targets.csv", "targets.png", "targets_fitted.csv", "targets_choosing.csv"):
        assert (tmp_path / "design" / name).exists()
    assert said
    said.clear()
    again = bilingual.study("design", settings, tmp_path, True, 1, said.append, parts)
    assert not said and again["text"] == first["text"]
    with pytest.raises(ValueError, match="parts=mian: write some of main"):
        bilingual.study("design", settings, tmp_path, True, 1, said.append, size("mian"))


def test_rows_are_those_of_the_cells(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bilingual_design, "STYLES", ("WSD",))
    bilingual.study("design", settings, tmp_path, True, 1, lambda line: None, size("main"))
    lines = (tmp_path / "design" / "WSD" / "cells.jsonl").read_text().splitlines()
    cells = {cell["key"]: cell for cell in map(json.loads, lines)}
    moved = [
        cells[f"flow/{s}"]["losses"]["russian"] - cells[f"constant/{s}"]["losses"]["russian"] for s in (1, 2)
    ]
    table = (tmp_path / "design" / "main.csv").read_text().splitlines()
    head = table[0].split(",")
    row = next(
        dict(zip(head, line.split(","), strict=True)) for line in table if ",flow,constant,russian," in line
    )
    assert float(row["change"]) == pytest.approx(np.mean(moved))
