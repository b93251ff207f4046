"""The language-model studies: states that restore, pairs that share their data, tables against hand counts, restarts."""

import json

import markov_text
import numpy as np
import pytest
import torch
from markov_text import SMALL

from megatron_commute.experiments import bilingual, bilingual_cells, bilingual_end_to_end, bilingual_paper
from megatron_commute.experiments import bilingual_tables as tables
from megatron_commute.experiments.bilingual_trainer import Settings, Text, Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return markov_text.write(tmp_path_factory.mktemp("text"))


@pytest.fixture
def settings(data):
    return Settings(data=data, **SMALL)


def test_a_state_restores_to_the_last_bit(settings):
    trainer = Trainer(settings, Text(settings))
    trainer.run([0.5, 0.5], 3)
    state = trainer.state()
    trainer.run([0.9, 0.1], 4)
    first = trainer.losses()
    again = Trainer(settings, Text(settings)).load(state)
    again.run([0.9, 0.1], 4)
    assert again.losses() == first


def test_the_weighted_loss_is_the_weighted_loss(settings):
    """Gradient of one step against autograd on the formula."""
    trainer = Trainer(settings, Text(settings))
    start = {n: p.clone() for n, p in trainer.model.named_parameters()}
    text = trainer.text
    parts = [text.batch(k, np.arange(settings.batch // 2), trainer.seed) for k in range(2)]
    trainer.step([0.8, 0.2])
    measured = [p.grad.clone() for p in trainer.model.parameters()]
    with torch.no_grad():
        for n, p in trainer.model.named_parameters():
            p.copy_(start[n])
    loss = 0.0
    for w, tokens in zip((0.8, 0.2), parts, strict=True):
        logits = trainer.model(tokens[:, :-1])
        loss = loss + w * torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    for ours, theirs in zip(
        measured, torch.autograd.grad(loss, list(trainer.model.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_both_orders_see_the_same_sequences(settings, tmp_path, monkeypatch):
    job = {"name": "even", "weights": [0.5, 0.5], "states": [2], "read_every": 10}
    bilingual_cells.base(settings, tmp_path, **job)
    seen, batch = {}, Text.batch

    def watched(self, domain, positions, seed):
        seen.setdefault(len(orders), []).append((domain, tuple(positions), seed))
        return batch(self, domain, positions, seed)

    monkeypatch.setattr(Text, "batch", watched)
    orders = []
    for order in ("12", "21"):
        orders.append(order)
        place = {
            "name": "even",
            "step": 2,
            "weights": [0.5, 0.5],
            "delta": 0.4,
            "window": 3,
            "tails": [2],
            "seed": 7,
        }
        found = bilingual_cells.pair(settings, tmp_path, **place, orders=[order])
        assert [steps for steps, _ in found[order]] == [0, 2]
    assert seen[1] == seen[2]


def test_numbers_of_a_table_against_hand_counts():
    losses, settings = {"english": 3.0, "russian": 4.0, "code": 5.0}, Settings(data="x")
    assert tables.loss_of(losses, "code", settings, [0.75, 0.25]) == 5.0
    assert tables.loss_of(losses, "mixture", settings, [0.75, 0.25]) == 3.25
    assert tables.mean_and_error([1.0, 3.0, 5.0]) == pytest.approx((3.0, 2 / 3**0.5))
    assert np.isnan(tables.mean_and_error([1.0])[1])


@pytest.mark.parametrize("name", ["paper", "end-to-end"])
def test_a_study_goes_on_after_a_torn_line_and_redraws_from_records(settings, tmp_path, name, monkeypatch):
    monkeypatch.setattr(
        bilingual_paper,
        "QUICK",
        bilingual_paper.Size(starts=(2,), window=2, tail=2, seeds=2, checkpoints=(3,)),
    )
    monkeypatch.setattr(
        bilingual_end_to_end, "QUICK", bilingual_end_to_end.Size(steps=12, every=2, end=4, seeds=2)
    )
    said = []
    first = bilingual.study(name, settings, tmp_path, quick=True, processes=1, say=said.append)
    assert said
    cells = tmp_path / name / "cells.jsonl"
    lines = cells.read_text().splitlines()
    cells.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:30])  # killed while it wrote
    said.clear()
    second = bilingual.study(name, settings, tmp_path, quick=True, processes=1, say=said.append)
    assert len(said) == 2
    assert second["text"] == first["text"]
    said.clear()
    third = bilingual.study(name, settings, tmp_path, quick=True, processes=1, say=said.append)
    assert not said
    assert third["text"] == first["text"]
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        bilingual.study(name, Settings(data=settings.data, **{**SMALL, "lr": 1.0}), tmp_path, quick=True)


def test_every_schedule_spends_its_budgets(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        bilingual_end_to_end, "QUICK", bilingual_end_to_end.Size(steps=20, every=2, end=4, seeds=2)
    )
    bilingual.study("end-to-end", settings, tmp_path, quick=True, processes=1, say=lambda line: None)
    for line in (tmp_path / "end-to-end" / "cells.jsonl").read_text().splitlines():
        assert json.loads(line)["served"] == [360, 60, 180]


def test_too_little_text_names_the_cure(data):
    with pytest.raises(ValueError, match="valid-share"):
        Text(Settings(data=data, **{**SMALL, "held": 1000}))


def test_settings_and_sizes_by_name():
    words = ["hidden=768", "lr=1.5e-4", "domains=a,b,c", "others=", "starts=2000,8000", "window=4000"]
    found, size = bilingual.asked("paper", "d", words)
    assert (found.hidden, found.lr, found.domains, found.others) == (768, 1.5e-4, ("a", "b", "c"), ())
    assert size == bilingual_paper.Size(starts=(2000, 8000), window=4000)
    with pytest.raises(ValueError, match="hidden is of type int"):
        bilingual.asked("paper", "d", ["hidden=x"])
    with pytest.raises(ValueError, match="--set depth=3: write NAME=VALUE with one of"):
        bilingual.asked("paper", "d", ["depth=3"])
