"""One bad checkpoint in a series is left out and named, alone it is refused in one line; parts of other steps are noticed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_runs import call

from megatron_commute.checkpoints import files as checkpoint_files
from megatron_commute.checkpoints.files import CheckpointError
from megatron_commute.checkpoints.readers import read

MODEL, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def rewritten(path, change):
    """The content of a file of torch, changed in place by change(content)."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def flags(**new):
    def change(state):
        state["arguments"] = json.dumps(json.loads(state["arguments"]) | new)

    return lambda step: rewritten(step / MODEL, change)


def plugin(change):
    def changed(state):
        said = json.loads(state["commute"])
        change(said)
        state["commute"] = json.dumps(said)

    return lambda step: rewritten(step / MODEL, changed)


def of_model(**new):
    return lambda step: rewritten(step / MODEL, lambda state: state.update(new))


def of_optimizer(change):
    return lambda step: rewritten(
        step / SHARD.format(1), lambda shard: change(shard["optimizer_state_dict"]["base_optimizer_state"])
    )


def from_other_step(name):
    return lambda step: shutil.copy(step.parent / "global_step4" / name, step / name)


# what is told of a checkpoint: how it was damaged
BAD = {
    "is not as its writer leaves it (JSONDecodeError": of_model(arguments='{"num_layers": 2, "hid'),
    "its flags say hidden_size wide": flags(hidden_size="wide"),
    "its flags say num_attention_heads 0, which no model has": flags(num_attention_heads=0),
    "its flags say num_layers 1e+300": flags(num_layers=1e300),
    "its flags say normalization BatchNorm; the analysis reads LayerNorm or RMSNorm": flags(
        normalization="BatchNorm"
    ),
    "lacks decoder.layers.9999.*": flags(num_layers=10**4),
    "embedding.word_embeddings.weight has shape": flags(hidden_size=2**20, num_attention_heads=1),
    "its state of the plug-in is of another version": of_model(commute='{"version": 1}'),
    "its state of the plug-in cannot be read (": plugin(lambda said: said["mixture"].update(version=99)),
    "its state of the plug-in cannot be read (it names no": plugin(lambda said: said.update(probes=-1)),
    "says step 4": of_model(iteration=4),
    "says step many": of_model(iteration="many"),
    "has no `module`": lambda step: rewritten(step / MODEL, lambda state: state.pop("module")),
    "optimiser has done 9999 steps": of_optimizer(
        lambda inner: [one.update(step=9999) for one in inner["state"].values()]
    ),
    "optimiser has done 7 steps, that in": of_optimizer(
        lambda inner: [one.update(step=7) for one in inner["state"].values()]
    ),
    "is not that of the model states; parts of different checkpoints": from_other_step(SHARD.format(1)),
    "global_step17/zero_pp_rank_0_mp_rank_00_optim_states.pt: its": from_other_step(MODEL),
    "optim_states.pt: is missing, 2 data-parallel ranks saved": lambda step: (
        step / SHARD.format(1)
    ).unlink(),
    "its optimiser has a beta of 2": of_optimizer(
        lambda inner: [group.update(betas=[0.9, 2.0]) for group in inner["param_groups"]]
    ),
    "optim_states.pt: is not as its writer leaves it (": of_optimizer(lambda inner: inner.update(state=[])),
    "is missing, or no regular file": lambda step: ((step / MODEL).unlink(), (step / MODEL).mkdir()),
}
NINES = f"global_step{'9' * 200}"


@pytest.fixture(scope="module")
def series(folder, tmp_path_factory):
    """A run of ZeRO 1 on two ranks: steps 4 and 8 as they were saved, then one bad checkpoint after the other."""
    run = Path(shutil.copytree(folder / "zero1", tmp_path_factory.mktemp("series") / "run"))
    shutil.rmtree(run / "global_step10")
    bad = {}
    for number, (told, damage) in enumerate(BAD.items()):
        step = Path(
            shutil.copytree(run / "global_step8", run / f"global_step{number + 1 + 8 * (number > 2)}0")
        )
        if told.startswith("global_step17"):
            step = step.rename(run / "global_step17")
        own = int(step.name.removeprefix("global_step"))
        rewritten(step / MODEL, lambda state, own=own: state.update(iteration=own, global_steps=own))
        damage(step)
        if told.startswith("global_step17"):
            rewritten(step / MODEL, lambda state, own=own: state.update(iteration=own, global_steps=own))
        bad[told] = step
    shutil.copytree(run / "global_step8", run / NINES)
    return run, bad


@pytest.mark.parametrize("told", BAD)
def test_a_bad_one_alone_is_refused_in_one_line(series, told):
    with pytest.raises(CheckpointError) as caught:
        read(series[1][told])
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert str(series[1][told]) in str(caught.value)


def test_a_series_goes_on_without_its_bad_ones_and_names_them(folder, series, tmp_path):
    run, bad = series
    place = (run, "--data", folder / "mixture.yaml", "--out", tmp_path / "out", "--method", "difference")
    found = call(*place, "--metric", "identity", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert [row["step"] for row in told["checkpoints"]] == [4, 8]
    reasons = {Path(one["checkpoint"]).name: one["reason"] for one in told["left_out"]}
    assert reasons.keys() == {step.name for step in bad.values()} | {NINES}
    for text, step in bad.items():
        assert text in reasons[step.name]
    assert "its name 999" in reasons[NINES] and "\n" not in "".join(reasons.values())


def test_the_first_one_may_be_bad(folder, series, tmp_path):
    run = tmp_path / "run"
    for told, name in (
        ("its flags say num_attention_heads 0, which no model has", "global_step2"),
        (None, "global_step8"),
    ):
        source = series[1][told] if told else series[0] / "global_step8"
        shutil.copytree(source, run / name)
    rewritten(run / "global_step2" / MODEL, lambda state: state.update(iteration=2))
    found = call(run, "--data", folder / "mixture.yaml", "--out", tmp_path / "out", "--metric", "identity")
    assert found.exit_code == 0 and "LEFT OUT" in found.output, found.output


def test_names_that_imply_very_many_ranks_are_answered_at_once(tmp_path):
    for name in ("zero_pp_rank_9999999999_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"ranks \(0, 0\) are missing"):
        checkpoint_files.files(tmp_path)
