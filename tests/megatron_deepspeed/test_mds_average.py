"""The mean of checkpoints in Megatron-DeepSpeed itself: loaded without a flag, and saved again as it was."""

import planned_jobs
import pytest
import torch
from commands import invoke

# without evaluations before the last step all runs evaluate the same samples
QUIET = {"--eval-interval 10": "--eval-interval 1000"}
# nothing is left to train, so that the host loads, evaluates and saves
DONE = QUIET | {"--train-iters 20": "--train-iters 15 --override-opt_param-scheduler"}


def leaves(node, within=""):
    """{path: tensor} of nested dicts and lists."""
    if torch.is_tensor(node):
        return {within: node}
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return {name: leaf for key, value in pairs for name, leaf in leaves(value, f"{within}/{key}").items()}


def tensors(place):
    """{(file, path): tensor} of a checkpoint but for random states, which an evaluation moves."""
    return {
        (path.name, name): tensor
        for path in place.glob("*.pt")
        for name, tensor in leaves(torch.load(path, map_location="cpu", weights_only=False)).items()
        if "rng_state" not in name
    }


@pytest.mark.parametrize("layout", ["zero1", "zero3", "bf16-pp2"])
def test_the_host_loads_the_mean_and_saves_it_again(scratch, tmp_path, layout):
    run = planned_jobs.Jobs(scratch, tmp_path, layout)
    run.add("run", "--save-interval", "5", "--exit-interval", "15", hooked=False, words=QUIET)
    run.run()
    mean, host = tmp_path / "mean", planned_jobs.Jobs(scratch, tmp_path, layout)
    done = invoke("average", tmp_path / "run" / "save", "--last", "0.7", "--out", mean)
    assert done.exit_code == 0 and "3 checkpoints (steps 5, 10, 15)" in done.stdout, done.output
    host.add("again", "--load", mean, hooked=False, words=DONE)
    host.add("on", "--load", mean, hooked=False, words=QUIET)
    host.add("anew", "--load", mean, "--finetune", "--skip-train", hooked=False, words=QUIET)
    seen = host.run()
    written = tensors(mean / "global_step15")
    saved = tensors(tmp_path / "again" / "save" / "global_step15")
    assert written.keys() == saved.keys()
    assert [name for name, tensor in written.items() if not torch.equal(saved[name], tensor)] == []
    moments = [tensor for (_, name), tensor in saved.items() if "exp_avg" in name]
    assert moments and not any(tensor.any() for tensor in moments)
    trained = tensors(tmp_path / "on" / "save" / "global_step20")
    assert {float(tensor) for (_, name), tensor in trained.items() if name.endswith("/step")} == {5.0}
    # begun anew, which the host can do under every stage but the third, it evaluates the same weights
    losses = {name: ranks[-1] and ranks[-1]["valid"][0] for name, ranks in seen.items()}
    assert losses["again"]
    assert losses["anew"] == (None if layout == "zero3" else losses["again"])
