"""The control file and what decisions may look at: pure parts, then a run whose file is edited while it goes on."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest
import ranks
from plain_loop import BATCH, NAMES, WEIGHTS, Loop, lines

from megatron_commute import reduce
from megatron_commute.config import Config, ConfigError, Controller, Domain
from megatron_commute.decide import control_file as control
from megatron_commute.decide import laws
from megatron_commute.decide.situation import Situation, facts, from_facts
from megatron_commute.mixture import Mixture

HERE = control.Limits(names=NAMES, feeds=True)
GOOD = "freeze: true\nweights: {en: 0.5, ru: 0.5}\nfrom: 64\ncaps: {en: 0.6}\n"


def test_every_key_is_read_and_travels_as_numbers(tmp_path):
    path = tmp_path / control.NAME
    path.write_text(GOOD)
    found, digest = control.read(path, HERE)
    assert (
        found == control.Control(freeze=True, weights=(0.5, 0.5, 0.0), at=64, caps=(0.6, 1.0, 1.0))
        and len(digest) == 64
    )
    more = control.Control(schedule=((64, (0.5, 0.5, 0.0)),), target=(0.0, 1.0, 0.0), strength=0.5)
    for one in (found, control.Control(), more):
        assert control.Control.of(json.loads(json.dumps(dataclasses.asdict(one)))) == one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("freeze: 1", "1: freeze: got 1; write true or false"),
        ("frozen: true", "1: frozen: unknown key; known here: freeze, weights, schedule, target, strength, from, caps"),
        ("weights: {en: 0.5}", "1: weights: got {\"en\": 0.5}; these sum to 0.5, write shares of the domains"),
        ("weights: {xx: 1}", "1: weights.xx: there is no such domain; the domains are en, ru, code"),
        ("from: 3", "1: from: there are no weights that could hold from there; write weights too"),
        ("caps: 0.2", "1: caps: they sum to 0.6; write caps that sum to at least 1"),
        ("weights: {en: 1}\ncaps: {en: 0.5}", "1: weights: 1 of en is above its cap 0.5; write a lower weight"),
        ("freeze: [", ": is not YAML"),
        ("[1, 2]", "is not a mapping"),
    ],
)  # fmt: skip
def test_a_broken_version_is_refused_with_its_cure(tmp_path, content, message):
    path = tmp_path / control.NAME
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        control.read(path, HERE)
    assert message in str(caught.value)
    path.write_text("weights: {en: 1}")
    with pytest.raises(ConfigError, match=r"mode shadow; leave them out"):
        control.read(path, control.Limits(names=NAMES, feeds=False))


def test_a_file_that_stays_is_not_read_again_and_a_broken_one_is_told_once(tmp_path, monkeypatch):
    path = tmp_path / control.NAME
    watch = control.Watch(path, HERE)
    assert watch.look() is None
    path.write_text(GOOD)
    assert watch.look().freeze
    with monkeypatch.context() as patch:
        patch.setattr(control, "read", None)
        assert watch.look() is None
    path.write_text("freeze: maybe # longer")
    assert "write true or false" in watch.look() and watch.look() is None
    path.write_text(GOOD + "# a comment only")
    assert watch.look() is None, "the same content is the same version"
    os.remove(path)
    assert watch.look() is None


def test_situations_survive_the_record():
    seen = Situation(
        weights=np.array([0.5, 0.5]), remaining=np.array([10.0, math.nan]), initial=np.array([0.5, 0.5]), samples_left=40,
        window=8, score=np.array([1e-3, -2.0 / 3]), score_se=np.ones(2), dof=3, minimum=np.zeros(2), maximum=np.ones(2),
        floors=np.zeros(2), caps=np.ones(2), rate=0.1, confidence=0.95, strength=1.0, losses=np.array([math.nan, 2.0]),
    )  # fmt: skip
    from megatron_commute.record.log import _plain

    again = from_facts(json.loads(json.dumps(_plain(facts(seen)))))
    for field in dataclasses.fields(seen):
        one, two = getattr(seen, field.name), getattr(again, field.name)
        same = np.array_equal(one, two, equal_nan=True) if isinstance(one, np.ndarray) else one == two
        assert same and type(one) is type(two), field.name


def settings(law, mode="act", compare=(), **more):
    domains = tuple(Domain(name=name, path=(name,)) for name in NAMES)
    law = Controller(law=law, compare=compare)
    return Config(domains=domains, mode=mode, controller=law, **more)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (settings("tilt", compare=("schedule",)), "controller.compare: schedule needs `scheduled`"),
        (settings("odd"), "controller.law: got odd; write one of hold, schedule, flow, proportional, tau-tail, tilt"),
        (settings("schedule"), "controller.law: schedule needs `scheduled`, which this run does not have; write schedule"),
        (settings("tau-tail", mode="act", target="each"), "needs `target`"),
    ],
)  # fmt: skip
def test_a_law_without_its_signal_is_refused_with_the_cure(config, words):
    with pytest.raises(ConfigError) as caught:
        laws.check(config)
    assert words in str(caught.value)
    laws.check(settings("hold", compare=("tilt", "odm")))


# --- a run ----------------------------------------------------------------------------------------------------------


def edited(folder, groups=None):
    """A run whose control file sets weights before step 10, breaks before step 20 and freezes before step 30."""
    loop = Loop(folder, steps=40, every=8, groups=groups, cooldown=0)
    path = folder / control.NAME
    for stop, content in (
        (10, "weights: {en: 0.2, ru: 0.1, code: 0.7}\nfrom: 98\n"),
        (20, "weights: 3"),
        (30, "freeze: true"),
    ):
        loop.until(stop)
        if reduce.rank() == 0:
            path.write_text(content)
    return loop.until()


def two_ranks(rank, folder):
    world = reduce.everyone()
    loop = edited(folder, reduce.Groups(world, None, world))
    return loop.drawn, loop.hook.steering.watch.digest


def test_an_edit_takes_effect_at_its_sample_is_logged_and_a_broken_one_is_ignored(tmp_path):
    loop = edited(tmp_path)
    told = lines(tmp_path, "control")
    # the first steps after the next log line, which comes every 3 steps
    assert [line["step"] for line in told] == [12, 21, 30] and "error" in told[1]
    assert told[0]["effective_sample"] == 100 >= 98 and 100 % BATCH == 0
    assert told[2]["freeze"] and not told[0]["freeze"] and any("IGNORED until" in line for line in loop.said)
    stream = Mixture(WEIGHTS, loop.plan.budgets, samples=loop.plan.samples)
    changes = [
        (line["effective_sample"], line["weights_next"])
        for line in lines(tmp_path, "probe")
        if line["effective_sample"]
    ]
    assert any(at < 100 for at, _ in changes), "a decision before it does not undo it"
    for at, weights in sorted([*changes, (100, told[0]["weights"])], key=lambda change: change[0]):
        stream.schedule(weights, at)
    assert loop.drawn == list(zip(*map(np.ndarray.tolist, stream.take(loop.plan.samples)), strict=True))
    assert loop.hook.stream.served.tolist() == list(loop.plan.budgets)
    (last,) = (line for line in lines(tmp_path, "probe") if line["step"] == 32)
    assert last["situation"]["frozen"] and "the weights are frozen" in last["reason"], (
        "only budgets may still win"
    )


def test_two_ranks_follow_the_first_ranks_file(tmp_path):
    one, two = ranks.run(two_ranks, 2, tmp_path, timeout=200)
    assert one == two and one[1]
