"""Rollouts in the trainer, DeepSpeed on two gloo ranks: the run goes on bit for bit, also after SIGKILL in the middle."""

from pathlib import Path

import jobs
import numpy as np
import pytest
import ranks

from megatron_commute import record

ITERS, AT, STEPS = (
    24,
    16,
    2 * 3,
)  # steps of the run; the probe's; steps of one rollout: two orders of one, one and one
EXTRA = "probe: {samples: 8, splits: 2}\n"
ROLLOUT = "response: {kind: rollout, window: 1, tail: 1, sequences: 4}\n"


def mixture(folder, name, extra):
    path = Path(jobs.write_mixture(folder, name, mode="fixed", iters=ITERS, extra=EXTRA + extra))
    path.write_text(path.read_text().replace("every: 8", f"every: {AT}"))
    return path


def without_timing(folder):
    return [{k: v for k, v in line.items() if k != "timing"} for line in record.read(folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    jobs.write_data(path)
    return path


def argv(folder, name, stage, *more):
    config = Path(__file__).resolve().parent.parent / "launch" / f"ds_zero{stage}.json"
    words = [
        "--commute",
        folder / f"{name}.yaml",
        "--save",
        folder / f"{name}{stage}",
        "--deepspeed_config",
        config,
    ]
    return jobs.flags(folder, *words, *more, iters=ITERS)


@pytest.fixture(scope="module")
def runs(folder):
    """{(name, ZeRO stage): what each rank saw} of runs with and without a rollout after step 16."""
    mixture(folder, "still.yaml", "")
    mixture(folder, "moved.yaml", ROLLOUT)
    wanted = [(name, stage) for stage in (1, 2) for name in ("still", "moved")]
    results = ranks.run(jobs.train, 2, [argv(folder, *one) for one in wanted], timeout=400)
    return {one: [results[rank][i] for rank in range(2)] for i, one in enumerate(wanted)}


@pytest.mark.parametrize("stage", [1, 2])
def test_after_a_rollout_every_loss_is_that_of_the_run_without(runs, folder, stage):
    for rank in range(2):
        still, moved = (np.array(runs[name, stage][rank]["losses"]) for name in ("still", "moved"))
        assert len(still) == ITERS and len(moved) == ITERS + STEPS
        np.testing.assert_array_equal(np.concatenate([moved[:AT], moved[AT + STEPS :]]), still)
    (line,) = (line for line in record.read(folder / f"moved{stage}") if line["event"] == "response")
    losses = np.array(line["losses"])
    assert losses.shape == (3, 2, 3) and np.isfinite(losses).all() and (losses[:, 0] != losses[:, 1]).any()
    assert line["step"] == AT and abs(sum(line["wave"])) < 1e-12 and any(line["wave"])


def test_killed_in_the_middle_of_a_rollout_the_restart_is_that_of_an_uninterrupted_run(runs, folder):
    run = folder / "killed"
    words = argv(folder, "moved", 1, "--load", run, "--save-interval", 5)
    words[words.index(str(folder / "moved1"))] = str(run)
    with pytest.raises(RuntimeError, match="died without a word"):
        ranks.run(jobs.train, 2, [words], AT + 1, timeout=200)
    assert not any(line["event"] == "response" for line in record.read(run))
    ranks.run(jobs.train, 2, [words], timeout=200)
    assert without_timing(run) == without_timing(folder / "moved1")
