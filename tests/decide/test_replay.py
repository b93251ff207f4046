"""Replay: the law that ran decides again what was logged; others see the same measurements; guardrails change."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from plain_loop import Loop

from megatron_commute.cli.main import main
from megatron_commute.decide import replay
from megatron_commute.record import log as record


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acted")
    Loop(folder, compare=("odm", "hold"), cooldown=0).until()
    return folder, record.read(folder)


@pytest.mark.parametrize("law", ["tilt", "odm", "hold"])
def test_replaying_a_law_repeats_what_was_logged_to_the_last_bit(acted, law):
    lines = [line for line in acted[1] if line["event"] == "probe"]
    again = replay.replay(acted[1], law)
    assert len(again) == len(lines) == 5
    for row, line in zip(again, lines, strict=True):
        assert row.weights == line["laws"][law]["weights"] and row.reason == line["laws"][law]["reason"]
        assert row.happened == line["weights_next"] and row.step == line["step"]
    assert any(row.weights for row in again)
    assert again == replay.replay(acted[1], law), "twice the same"


def test_a_record_checks_itself(acted):
    assert replay.agreement(acted[1]) == (5, 5)
    broken = json.loads(json.dumps(acted[1]))
    next(line for line in broken if line["event"] == "probe")["situation"]["score"][0] *= -3
    assert replay.agreement(broken)[0] < 5


def test_guardrails_change_what_would_have_been(acted):
    tight = replay.replay(acted[1], changed=replay.guards(["rate=0.01", "floors=0.05"]))
    for row in tight:
        if row.weights is not None and "budgets win" not in row.reason:
            assert np.abs(np.subtract(row.weights, row.before)).max() <= 0.01 + 1e-9
    never = replay.replay(acted[1], changed=replay.guards(["freeze=0.01"]))
    assert all("the law stops at 0.01" in row.reason for row in never)
    assert replay.guards(["rate=0.1", "cooldown=3"]) == {"rate": 0.1, "cooldown": 3}
    for text, cure in (
        ("rat=1", "no such guardrail; write one of rate"),
        ("rate=x", "is no number; write rate=NUMBER"),
    ):
        with pytest.raises(ValueError, match=cure):
            replay.guards([text])


def test_a_record_of_0_1_0_is_replayed_where_nothing_that_was_cut_had_a_say(acted):
    lines = json.loads(json.dumps(acted[1]))
    probes = [line for line in lines if line["event"] == "probe"]
    for line in probes:  # fields of a Situation then
        line["situation"] |= {
            "effect": None,
            "gate": 5e-4,
            "harm": 2e-3,
            "end_share": 0.0,
            "end_weights": None,
        }
    assert replay.replay(lines) == replay.replay(acted[1])
    probes[2]["situation"]["end_share"] = 0.1
    with pytest.raises(ValueError, match=r"an end phase .* cut in 0\.2\.0: replay it with version 0\.1\.0"):
        replay.replay(lines)
    probes[2]["situation"]["end_share"], probes[3]["calibration"] = 0.0, {"P adam/local": {"hits": 3}}
    with pytest.raises(ValueError, match="calibrated signals"):
        replay.replay(lines)
    lines[0]["controller"]["law"] = "finish"
    with pytest.raises(ValueError, match=r"law finish was cut in 0\.2\.0 .*; replay it with version 0\.1\.0"):
        replay.replay(lines)


def test_what_cannot_be_replayed_is_named(acted):
    with pytest.raises(ValueError, match="write one of hold"):
        replay.replay(acted[1], "tilts")
    old = [{k: v for k, v in line.items() if k != "situation"} for line in acted[1]]
    with pytest.raises(ValueError, match="nothing to replay"):
        replay.replay(old)


def test_the_command_prints_draws_and_refuses(acted, tmp_path):
    run = CliRunner()
    done = run.invoke(main, ["replay", str(acted[0]), "--law", "hold", "--out", str(tmp_path / "r.png")])
    assert done.exit_code == 0, done.output
    assert (
        "hold" in done.output
        and "would have been" in done.output
        and (tmp_path / "r.png").stat().st_size > 5000
    )
    told = json.loads(run.invoke(main, ["replay", str(acted[0]), "--json"]).output)
    assert told["law"] == "tilt" and told["repeated"] == [5, 5]
    assert told["decisions"] == [dataclasses.asdict(row) for row in replay.replay(acted[1])]
    for words in (["--law", "none"], ["--guard", "rate"]):
        refused = run.invoke(main, ["replay", str(acted[0]), *words])
        assert refused.exit_code == 2 and "error: " in refused.output
