"""A mixture file joined with a run of 100 iterations x global batch 8 = 800 samples of 16 tokens."""
# ruff: noqa: E501  (messages stand in one piece, so that they can be searched)

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_commute.config import ConfigError, Run, holdout_parts, load, probe_cost, probe_steps, resolve

TWO = "domains:\n  en: {path: en}\n  ru: {path: ru}\n"
EQUAL = "domains:\n  en: {path: en, weight: 0.5}\n  ru: {path: ru, weight: 0.5}\n"
RUN = Run(seq_length=16, global_batch=8, micro_batch=2, data_parallel=2, train_iters=100, prefetched=4)


def loaded(tmp_path, content):
    path = tmp_path / "mixture.yaml"
    path.write_text(content)
    return load(path)


def plan(tmp_path, content, run=RUN, sequences=(4000, 4000), holdouts=None):
    return resolve(loaded(tmp_path, content), run, sequences, holdouts)


def refusal(tmp_path, content, run=RUN, sequences=(4000, 4000)):
    """The one message that the file and the run end with, without the folder; nothing is written."""
    before = {path.name for path in tmp_path.iterdir()} | {"mixture.yaml"}
    config = loaded(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        resolve(config, run, sequences)
    assert "\n" not in str(caught.value) and {path.name for path in tmp_path.iterdir()} == before
    return str(caught.value).replace(f"{tmp_path}/", "")


def domains(en, ru, rest=""):
    return f"domains:\n  en: {{path: en, {en}}}\n  ru: {{path: ru, {ru}}}\n{rest}"


@pytest.mark.parametrize(
    ("en", "ru", "weights", "shares"),
    [
        ("budget: 600", "budget: 200", [0.75, 0.25], [0.75, 0.25]),
        ("budget: 600", "budget: null", [0.75, 0.25], [0.75, 0.25]),
        ("budget: 600, weight: 0.5", "budget: 200", [0.5, 0.5], [0.75, 0.25]),
        ("weight: 0.9", "weight: null", [0.9, 0.1], [0.9, 0.1]),
        ("weight: 0.9", "weight: 0.1", [0.9, 0.1], [0.9, 0.1]),
        ("weight: 0.5, budget: 600", "weight: 0.5", [0.5, 0.5], [0.75, 0.25]),
        ("weight: 0.9999995", "weight: 0.1e-6", [1.0, 0.0], [1.0, 0.0]),
        ("budget: 9.6ktok", "budget: 3200tok", [0.75, 0.25], [0.75, 0.25]),
    ],
)
def test_weights_and_shares(tmp_path, en, ru, weights, shares):
    planned = plan(tmp_path, domains(en, ru))
    np.testing.assert_allclose(planned.weights, weights, atol=1e-6)
    np.testing.assert_allclose(planned.shares, shares, atol=1e-6)
    np.testing.assert_allclose(planned.targets, [shares], atol=1e-6)
    assert planned.weights.sum() == pytest.approx(1, abs=1e-15)


def test_omitted_weights_share_the_rest_by_budget(tmp_path):
    content = "domains:\n  a: {path: a, weight: 0.4, budget: 500}\n  b: {path: b, budget: 200}\n  c: {path: c, budget: 100}\n"
    planned = plan(tmp_path, content, sequences=[4000] * 3)
    np.testing.assert_allclose(planned.weights, [0.4, 0.4, 0.2])
    np.testing.assert_allclose(planned.shares, [0.625, 0.25, 0.125])
    assert planned.budgets == (500, 200, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (domains("weight: 0.6", "weight: 0.6"), "1: domains: the weights sum to 1.2 (en 0.6, ru 0.6); write weights that sum to 1"),
        (domains("weight: 1", "weight: null"), "3: domains.ru.weight: missing, and the others sum to 1 already; write 0 here or lower the others"),
        (TWO, "2: domains.en.weight: missing, and there is no budget to take the share from; write a weight (all sum to 1) or a budget"),
        (domains("budget: 600", "budget: 208"), "2: domains.en.budget: the budgets sum to 808 sequences, the run has 800 (100 iterations x global batch 8); run --train-iters 101 or write 592 here"),
        (domains("budget: 600", "budget: 199"), "2: domains.en.budget: the budgets sum to 799 sequences, the run has 800 (100 iterations x global batch 8); write 601 here or write null for a domain that may fill the rest"),
        (domains("budget: 100", "budget: 900, weight: 0.1"), "3: domains.ru.budget: the budgets sum to 1000 sequences, the run has 800 (100 iterations x global batch 8); run --train-iters 125 or write 700 here"),
        (domains("budget: 801", "weight: 0.1"), "2: domains.en.budget: the budgets sum to 801 sequences, the run has 800 (100 iterations x global batch 8); write 800 here"),
        (domains("budget: 15tok", "weight: 1"), "2: domains.en.budget: 15 tokens fill no sequence of 16; write more tokens"),
        (domains("budget: 600, max: 0.7", "weight: 0.3"), "2: domains.en.max: 0.7 is below the share of the run's samples of en, 0.75; write at least 0.75, or give en less"),
        (domains("budget: 600", "min: 0.3"), "3: domains.ru.min: 0.3 is above the weight of ru, 0.25; write at most 0.25, or give ru more"),
        (domains("weight: 0.5, min: 0.6", "weight: 0.5, min: 0.6"), "3: domains.ru.min: the lower bounds sum to 1.2; write bounds that sum to at most 1"),
        (domains("weight: 0.5, max: 0.3", "weight: 0.5, max: 0.4"), "2: domains.en.max: the upper bounds sum to 0.7; write bounds that sum to at least 1"),
        (EQUAL + "mode: act\ncontroller:\n  floors: {en: 0.55}", "6: controller.floors: 0.55 is above the weight of en, 0.5; write at most 0.5, or give en more"),
        (EQUAL + "lead: 19", "4: lead: 19 samples, is less than the 20 samples that the data loaders read ahead; write 20 or more, or start fewer --num-workers"),
    ],
)  # fmt: skip
def test_file_that_does_not_fit_the_run(tmp_path, content, message):
    assert refusal(tmp_path, content) == f"mixture.yaml:{message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_parallel": 3}, "--global-batch-size: 8 is not divisible by --micro-batch-size 2 x data-parallel size 3 = 6; write 12, or start another number of ranks"),
        ({"train_iters": 0}, "--train-iters: got 0; write a positive number"),
    ],
)  # fmt: skip
def test_run_that_does_not_fit(tmp_path, change, message):
    assert refusal(tmp_path, EQUAL, dataclasses.replace(RUN, **change)) == message


def test_floors_and_caps_bind_in_mode_act_only(tmp_path):
    content = domains(
        "weight: 0.5, min: 0.1", "weight: 0.5, max: 0.9", "controller: {floors: 0.2, caps: {en: 0.7}}\n"
    )
    watched = plan(tmp_path, content)
    assert (list(watched.minimum), list(watched.maximum)) == ([0.1, 0.0], [1.0, 0.9])
    acting = plan(tmp_path, content + "mode: act\n")
    assert (list(acting.minimum), list(acting.maximum)) == ([0.2, 0.2], [0.7, 0.9])


def test_targets(tmp_path):
    assert plan(tmp_path, EQUAL + "target: {ru: 1}").targets.tolist() == [[0.0, 1.0]]
    assert plan(tmp_path, EQUAL + "target: each").targets.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert plan(tmp_path, EQUAL).targets.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(("mode", "size"), [("shadow", 4000), ("fixed", 3744), ("act", 3744)])
def test_holdout_comes_off_the_training_part(tmp_path, mode, size):
    planned = plan(tmp_path, EQUAL + f"mode: {mode}\n")
    assert planned.holdouts == (256, 256) and planned.sizes == (size, size)
    overlap = [w for w in planned.warnings if "the host trains on it too" in w]
    assert len(overlap) == (2 if mode == "shadow" else 0)
    apart = domains("weight: 0.5, holdout: held/en", "weight: 0.5, holdout: 400", f"mode: {mode}\n")
    planned = plan(tmp_path, apart, holdouts=[128, None])
    assert planned.holdouts == (128, 400) and planned.sizes[0] == 4000


@pytest.mark.parametrize(
    ("holdout", "samples", "total", "message"),
    [
        (None, 64, 1000, "the default, 256 sequences, is 26% of the 1000 there are, over 20 %; write 200 or less, name a separate prefix, or add text"),
        (201, 32, 1000, "201 sequences, is 20% of the 1000 there are, over 20 %; write 200 or less, name a separate prefix, or add text"),
        (127, 64, 1000, "127 sequences are too few for one probe of 64 samples; hold out 128 or more, or lower probe.samples"),
        (15, 4, 1000, "15 sequences are too few for one probe of 4 samples; hold out 16 or more, or lower probe.samples"),
    ],
)  # fmt: skip
def test_holdout_that_does_not_fit(tmp_path, holdout, samples, total, message):
    content = EQUAL.replace("en,", f"en, holdout: {holdout},".replace("None", "null"))
    content += f"probe: {{samples: {samples}}}\n"
    got = refusal(tmp_path, content, sequences=[total, 4000])
    assert got == f"mixture.yaml:2: domains.en.holdout: {message}"


def test_domain_without_a_sequence(tmp_path):
    got = refusal(tmp_path, EQUAL, sequences=(4000, 0))
    assert got.startswith("mixture.yaml:3: domains.ru.path: ru holds no whole sequence; add text or shorten")


@given(st.integers(0, 10_000))
def test_holdout_parts_are_disjoint_and_complete(n):
    parts = holdout_parts(n)
    assert [i for part in parts for i in part] == list(range(n))
    assert len(parts.gradients) == n // 2 and len(parts.direction) == n // 4 <= len(parts.targets)


def test_warnings(tmp_path):
    content = domains(
        "weight: 0.7, budget: 600, holdout: 56", "weight: 0.3, budget: 3201tok", "mode: fixed\n"
    )
    content += "every: 50\nprobe: {samples: 16}\n"
    found = plan(tmp_path, content, sequences=[556, 4000]).warnings
    assert found == (
        "domains.en.weight: 0.7, but its share of the run's samples is 0.75",
        "domains.en: its 500 sequences are used 1.20 times",
        "domains.ru.budget: 200 sequences of 16 tokens, 1 tokens remain unused",
        "domains.ru.weight: 0.3, but its share of the run's samples is 0.25",
        "measure_budget: probes cost 11.00% of training, over 0.50%",
    )
    assert plan(tmp_path, EQUAL + "mode: act\nevery: 50\nmeasure_budget: 1\n").warnings == ()


def test_cost_of_probes(tmp_path):
    assert list(probe_steps(30, 91)) == [30, 60, 90] and list(probe_steps(30, 90)) == [30, 60]

    def cost(more):
        return probe_cost(loaded(tmp_path, EQUAL + "every: 25\n" + more), RUN)

    # 2 domains x (64 samples x 2 gradients + 32 for the direction + 4 for the error) = 328; 3 probes in 800 samples
    assert cost("") == (3, 328, 1.23)
    assert cost("probe: {memory: scores}").gradients == 2 * 64 * 4 + 2 * 32 + 8  # two passes of products
    assert cost("probe: {method: exact}").gradients == 2 * 64 * 3.1 + 2 * 32
    assert cost("target: {ru: 1}").gradients == 2 * (64 * 2 + 4) + 32
    assert cost("target: each").gradients == 2 * (2 * (64 * 2 + 4)) + 2 * 32
    assert cost("probe: {samples: 4}").gradients == 2 * (4 * 2 + 4) + 2 * 4, (
        "one direction sequence a split at least"
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("at,en\n0,1", "s.csv:1: the columns are at,en; write at,then,en,ru"),
        ("at,en,ru\n50%,0,1", "sample 400: weight 1 of ru is outside min 0, max 0.9; change the point or the bounds"),
        ("at,en,ru\n0,0.5,0.5", "the schedule asks for 400 samples of en, its budget is 600; write points that add up to it, budget: 400, or budget: null"),
    ],
)  # fmt: skip
def test_bad_schedule(tmp_path, table, message):
    (tmp_path / "s.csv").write_text(table)
    content = domains("weight: 0.5, budget: 600", "weight: 0.5, max: 0.9", "mode: fixed\nschedule: s.csv\n")
    assert refusal(tmp_path, content) == f"mixture.yaml:5: schedule: {message}"


def test_schedule(tmp_path):
    content = TWO + "mode: fixed\nschedule: s.csv\n"
    with pytest.raises(
        ConfigError, match=r"s\.csv: cannot be read: No such file or directory; name a CSV file"
    ):
        plan(tmp_path, content)
    (tmp_path / "s.csv").write_text("at,ru,en\n0,0.25,0.75\n75%,0.75,0.25\n")
    planned = plan(tmp_path, content)
    assert [(at, list(weights)) for at, weights in planned.schedule] == [
        (0, [0.75, 0.25]),
        (600, [0.25, 0.75]),
    ]
    assert list(planned.weights) == [0.75, 0.25], "the schedule gives the weights that the file does not"
    assert list(planned.shares) == [0.625, 0.375] and list(planned.targets[0]) == [0.625, 0.375]
    assert not [warning for warning in planned.warnings if "weight" in warning]


def test_schedule_that_begins_later_needs_weights(tmp_path):
    (tmp_path / "s.csv").write_text("sample,ru,en\n400,0.75,0.25\n")
    assert "domains.en.weight: missing" in refusal(tmp_path, TWO + "mode: fixed\nschedule: s.csv\n")
    planned = plan(tmp_path, EQUAL + "mode: fixed\nschedule: s.csv\n")
    assert list(planned.weights) == [0.5, 0.5] and list(planned.shares) == [0.375, 0.625]
