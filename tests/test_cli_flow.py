"""The command line before a run of law flow: what plan and design print, draw, write and refuse."""

import json

import indexed_files
import numpy as np
import pytest
from commands import invoke

from megatron_commute.config import Run, load, resolve
from megatron_commute.data.indexed import inspect_data
from megatron_commute.mixture import Mixture

SIZE = "--seq-length 8 --global-batch-size 4 --micro-batch-size 2 --train-iters 200 --num-workers 0"
RATES = "--lr 1e-3 --lr-decay-style WSD --lr-wsd-decay-iters 40 --lr-warmup-iters 10"
MIXTURE = """domains:
  en: {path: en, budget: 600}
  ru: {path: ru, budget: 200, holdout: 64}
target: {ru: 1}
mode: fixed
every: 50
probe: {samples: 16}
controller: {law: flow}
measure_budget: 1
"""


@pytest.fixture
def mixture(tmp_path):
    for name in ("en", "ru"):
        indexed_files.write(tmp_path / name, np.arange(8 * 2000 + 1))
    path = tmp_path / "mixture.yaml"
    path.write_text(MIXTURE)
    return path


def test_plan_draws_the_schedule_beside_the_rate(mixture):
    before = sorted(mixture.parent.iterdir())
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    start = lines.index("schedule:")
    assert "mode: fixed, law flow; 800 samples in 200 steps" in lines
    assert lines[start + 1].startswith("  en            |") and lines[start + 1].endswith("| 600 samples")
    assert lines[start + 3].startswith("  learning rate |") and lines[start + 3].endswith("| peak 0.001")
    bars = [line.split("|")[1] for line in lines[start + 1 : start + 4]]
    assert (
        "▄" in bars[1][46:49] and max(bars[1]) == "▄" and bars[2][47] == "█" and bars[2][55] < "█"
    )  # the decay begins at 48 of 60
    assert "flow: ranges en -0.35, ru +1.05; memory 2.5; the first 20 steps at the planned mixture" in lines
    assert sorted(mixture.parent.iterdir()) == before
    shown = json.loads(invoke("plan", mixture, *SIZE.split(), *RATES.split(), "--json").output)
    assert shown["flow"]["scale"]["peak"] == 1e-3 and len(shown["schedule"]) == 100


def test_plan_draws_a_picture(mixture, tmp_path):
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split(), "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.output.splitlines()[-1] == f"{tmp_path}/out/flow.png"
    assert (tmp_path / "out" / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_plan_says_in_one_line_that_the_default_target_changes_nothing(mixture):
    mixture.write_text(MIXTURE.replace("target: {ru: 1}\n", ""))
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    (line,) = [line for line in done.output.splitlines() if "flow keeps the planned mixture" in line]
    assert line.startswith("warning: ") and line.endswith("with the key target")
    assert json.loads(invoke("plan", mixture, *SIZE.split(), *RATES.split(), "--json").output)[
        "schedule"
    ] == [[0, [0.75, 0.25]]]


def test_mode_act_without_a_law_plans_by_flow(mixture):
    mixture.write_text(MIXTURE.replace("mode: fixed", "mode: act").replace("controller: {law: flow}\n", ""))
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    assert "mode: act, law flow; 800 samples in 200 steps" in done.output.splitlines()
    assert "memory 2.5" in done.output
    done = invoke("plan", mixture, *SIZE.split())
    assert done.exit_code == 2 and "--lr: missing" in done.stderr


@pytest.mark.parametrize(("law", "warns"), [("flow", True), ("hold", False)])
def test_a_target_that_is_not_scarce_is_warned_of(mixture, law, warns):
    """A quarter of the samples: between a tenth, where flow was measured to gain, and three tenths, where it cost more."""
    mixture.write_text(MIXTURE.replace("{law: flow}", f"{{law: {law}}}"))
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    told = (
        "warning: target: its scarcest domain has 25% of the samples; measured, flow gained at 10% and cost"
    )
    assert any(line.startswith(told) for line in done.output.splitlines()) == warns
    mixture.write_text(MIXTURE.replace("ru: 1", "ru: 1, en: 0").replace("600", "720").replace("200", "80"))
    assert "scarcest" not in invoke("plan", mixture, *SIZE.split(), *RATES.split()).output


def test_a_memory_beyond_all_that_were_measured_is_capped_and_said_once(mixture):
    mixture.write_text(MIXTURE.replace("{law: flow}", "{law: flow, memory: 12}"))
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    (line,) = [line for line in done.output.splitlines() if "controller.memory" in line]
    assert line == "warning: controller.memory: 12, over all that were measured; flow takes 10"
    assert "memory 10;" in done.output
    mixture.write_text(MIXTURE.replace("{law: flow}", "{law: flow, memory: 5}"))
    done = invoke("plan", mixture, *SIZE.split(), *RATES.split())
    assert "memory 5;" in done.output and "controller.memory" not in done.output


def test_a_design_is_read_as_a_schedule_with_exact_budgets(mixture, tmp_path):
    mixture.write_text(MIXTURE.replace("mode: fixed", "mode: act").replace("{law: flow}", "{law: tilt}"))
    done = invoke(
        "design", mixture, "--law", "flow", *SIZE.split(), *RATES.split(), "--out", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    names = ["schedule.csv", "flow.png", "report.html"]
    assert done.output.splitlines()[-3:] == [f"{tmp_path}/out/{name}" for name in names]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page and "Planned order of data: en, ru" in page and "half used at" in page
    text = MIXTURE.replace("mode: fixed", "mode: fixed\nschedule: out/schedule.csv").replace("flow}", "hold}")
    mixture.write_text(text)
    config, run = load(mixture), Run(8, 4, 2, 1, 200)
    plan = resolve(config, run, *inspect_data(config, 8))
    mixture.write_text(MIXTURE)
    shown = json.loads(invoke("plan", mixture, *SIZE.split(), *RATES.split(), "--json").output)
    assert [at for at, _ in plan.schedule] == [at for at, _ in shown["schedule"]]
    for (_, weights), (_, planned) in zip(plan.schedule, shown["schedule"], strict=True):
        assert weights == pytest.approx(planned, abs=1e-15)
    stream = Mixture(plan.weights, plan.budgets)
    for at, weights in plan.schedule:
        stream.schedule(weights, at)
    stream.skip(800)
    assert stream.served.tolist() == [600, 200] and not stream.projections


def test_a_limit_of_harm_sets_the_strength(mixture, tmp_path):
    out = "--out", tmp_path / "out"
    done = invoke("design", mixture, "--law", "flow", *SIZE.split(), *RATES.split(), *out, "--harm", "0.002")
    assert done.exit_code == 0 and "strength 0.4" in done.output.splitlines()
    less = json.loads(
        invoke(
            "design",
            mixture,
            "--law",
            "flow",
            *SIZE.split(),
            *RATES.split(),
            *out,
            "--harm",
            "0.002",
            "--json",
        ).output
    )
    full = json.loads(
        invoke("design", mixture, "--law", "flow", *SIZE.split(), *RATES.split(), *out, "--json").output
    )
    assert less["flow"]["ranges"] == pytest.approx([0.4 * reach for reach in full["flow"]["ranges"]])
    done = invoke("design", mixture, "--law", "flow", *SIZE.split(), *RATES.split(), *out, "--harm", "0")
    assert (
        done.exit_code == 2
        and done.stderr == "error: --harm: harm 0.0: write a part of the loss above 0, such as 0.005\n"
    )


@pytest.mark.parametrize(
    ("written", "instead", "more", "message"),
    [
        ("", "", [], "--lr: missing; without it the learning rates are unknown"),
        ("", "", ["--lr", "1", "--lr-warmup-iters", "300", "--lr-decay-iters", "400"], "in a run of --train-iters 200"),
        ("", "", ["--lr", "1", "--lr-warmup-iters", "200"], "leaves nothing of --train-iters 200"),
        ("{law: flow}", "{law: flow, strength: 20}", RATES.split(), "strength 20.0; write a number above 0, at most 10"),
        ("mode: fixed", "mode: shadow", RATES.split(), "controller.law: flow plans weights, which mode shadow leaves"),
        ("law: flow", "law: hold", ["--out", "pictures"], "--out pictures: only law flow's schedule is drawn"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_ends_with_one_line(mixture, written, instead, more, message):
    mixture.write_text(MIXTURE.replace(written, instead))
    done = invoke("plan", mixture, *SIZE.split(), *more)
    assert done.exit_code == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and message in done.stderr
