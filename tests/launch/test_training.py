"""Whole training jobs on two gloo ranks: bit-identity without steering, P against an independent oracle, kill and resume."""

import contextlib
import copy
import io
import json
from pathlib import Path

import jobs
import numpy as np
import oracles
import pytest
import ranks
import torch

from megatron_commute.config import Run, load, resolve
from megatron_commute.data.indexed import domain_datasets
from megatron_commute.data.sampler import MixedDataset
from megatron_commute.mixture import Mixture
from megatron_commute.record import log as record
from megatron_commute.record.tally import sample_hashes

PROBE = "probe: {samples: 16, splits: 4, method: %s, metric: %s}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    jobs.write_data(path)
    return path


@pytest.fixture(scope="module")
def runs(folder):
    """One launch of two ranks for all runs that need no restart: name -> what each rank saw."""
    act = jobs.write_mixture(folder, "act.yaml", extra=PROBE % ("difference", "adam"))
    exact = jobs.write_mixture(folder, "exact.yaml", iters=10, extra=PROBE % ("exact", "identity"))
    shadow = jobs.write_mixture(folder, "shadow.yaml", mode="shadow", extra=PROBE % ("difference", "adam"))
    argvs = {
        "stock": jobs.flags(folder, iters=50),
        "shadow": jobs.flags(folder, "--commute", shadow, "--save", folder / "shadow", iters=50),
        "act": jobs.flags(folder, "--commute", act, "--save", folder / "act", "--num-workers", 2),
        "exact": jobs.flags(folder, "--commute", exact, "--save", folder / "exact", iters=10),
    }
    near = jobs.write_mixture(folder, "near.yaml", iters=10, extra=PROBE % ("difference", "identity"))
    for name, file, more in (
        ("tensor", exact, ("--tensor-model-parallel-size", 2)),
        ("bf16 exact", exact, ("--bf16",)),
        ("bf16 difference", near, ("--bf16",)),
    ):
        argvs[name] = jobs.flags(folder, "--commute", file, "--save", folder / name, *more, iters=10)
    results = ranks.run(jobs.train, 2, list(argvs.values()), timeout=400)
    return {name: [results[rank][i] for rank in range(2)] for i, name in enumerate(argvs)}


def test_shadow_mode_leaves_every_loss_bit_identical(runs):
    for rank in range(2):
        stock, shadow = (np.array(runs[name][rank]["losses"]) for name in ("stock", "shadow"))
        assert stock.shape == (50, 4)
        np.testing.assert_array_equal(stock, shadow)
    assert len(runs["shadow"][0]["probes"]) == 6 and not runs["stock"][0]["probes"]


def test_dropout_is_on_in_training_and_the_ranks_see_different_samples(runs):
    one, two = (np.array(runs["stock"][rank]["losses"]) for rank in range(2))
    assert (one != two).all()


def test_with_dropout_tensor_parallel_ranks_keep_equal_copies_of_what_they_share(runs):
    """Dropout of shared activations must be the same on both, or layer norms and positions drift apart."""
    one, two = (seen["probes"][0]["state"] for seen in runs["tensor"])
    shared = [name for name in one if "layernorm" in name or "position" in name]
    assert len(shared) > 8
    for name in shared:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    np.testing.assert_array_equal(*(np.array(seen["losses"]) for seen in runs["tensor"]))


def test_bf16_models_are_measured_in_float32_by_both_methods(runs, folder):
    """Both read the same float32 copies of bf16 weights, so they agree as closely as in a float32 run."""
    (one,), (two,) = (
        [line for line in record.read(folder / f"bf16 {method}") if line["event"] in ("probe", "skip")]
        for method in ("difference", "exact")
    )
    away = np.abs(np.array(one["P"]) - np.array(two["P"])).max()
    assert 0 < away <= 1e-3 * np.abs(two["M"]).max()


def oracle_P(seen, targets, splits, samples):
    """max|M| and P by double backward in float64 on an independent GPT: the definition, replicate by replicate."""
    state = {name: torch.from_numpy(value) for name, value in seen["state"].items()}
    model = oracles.gpt_from_megatron([state], jobs.HEADS)
    order = {oracles.plain_name(name): i for i, name in enumerate(seen["state"])}
    names, params = oracles.parameters(model)
    D = [
        torch.from_numpy(seen["metric"][order[n]]).double() if seen["metric"] else torch.ones(())
        for n in names
    ]
    K, n, m = len(jobs.DOMAINS), samples // splits, samples // splits // 2
    replicates = []
    for split in range(splits):

        def loss(part, k, count, split=split):
            tokens = torch.from_numpy(seen["draw"][part, k][split * count : (split + 1) * count])
            return oracles.language_loss(model, tokens[:, :-1], tokens[:, 1:])

        slopes = [gradient(loss("direction", k, m), params) for k in range(K)]
        u = [d * sum(targets[k] * slopes[k][i] for k in range(K)) for i, d in enumerate(D)]
        g = [gradient(loss("gradient", k, n), params) for k in range(K)]
        h = [oracles.product(loss("gradient", k, n), params, u) for k in range(K)]
        replicates.append(
            [[sum(float((a * d * b).sum()) for a, d, b in zip(x, D, y, strict=True)) for y in g] for x in h]
        )
    M = np.mean(replicates, axis=0)
    return np.abs(M).max(), M.T - M


def gradient(loss, params):
    leaves = [p.detach().requires_grad_(True) for p in params]
    return torch.autograd.grad(loss(leaves), leaves)


@pytest.mark.parametrize("name", ["act", "exact"])
def test_P_of_the_running_job_equals_double_backward_in_float64(runs, folder, name):
    lines = record.read(folder / name)
    probes = [line for line in lines if line["event"] == "probe"]
    assert len(probes) == (4 if name == "act" else 1)
    for line, seen in zip(probes, runs[name][0]["probes"], strict=True):
        scale, P = oracle_P(seen, line["target"], 4, 16)
        assert np.abs(np.array(line["P"]) - P).max() <= 1e-4 * scale


def test_what_was_drawn_is_what_the_log_says(runs, folder):
    lines = record.read(folder / "act")
    start = lines[0]
    stream = Mixture(start["weights"], start["budgets"], samples=start["samples"])
    config = load(str(folder / "act.yaml"))
    run = Run(jobs.SEQUENCE, 8, 2, 2, 40, 4)
    plan = resolve(
        config, run, *[[s + h for s, h in zip(start["sizes"], start["holdouts"], strict=True)], [None] * 3]
    )
    data = MixedDataset(domain_datasets(config, plan, jobs.SEQUENCE)[0], start["seed"])
    moved = [line for line in lines if line["event"] == "probe" and line["effective_sample"] is not None]
    assert moved
    for line in moved:
        assert line["effective_sample"] >= line["sample"] + start["lead"]
        stream.schedule(line["weights_next"], line["effective_sample"])
    fingerprint, samples = 0, 0
    for line in (line for line in lines if line["event"] == "loss"):
        for domain, position in zip(*stream.take(line["sample"] - samples), strict=True):
            tokens = data[int(domain), int(position)]["tokens"].numpy()
            (code,) = sample_hashes(*([part] for part in (samples, domain, position)), tokens[None])
            fingerprint = (fingerprint + int(code)) % 2**64
            samples += 1
        assert list(line["served"].values()) == stream.served.tolist()
        assert line["fingerprint"] == f"{fingerprint:016x}"
    assert stream.served.tolist() == start["budgets"]
    for line in moved:
        assert line["weights_next"] != line["weights"] and abs(sum(line["weights_next"]) - 1) < 1e-12


def without_timing(folder):
    lines = [copy.deepcopy(line) for line in record.read(folder)]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def test_killed_twice_and_started_again_the_log_is_that_of_an_uninterrupted_run(runs, folder):
    """SIGKILL at two steps drawn with a fixed seed, one on each rank; the log holds stream, losses, P and weights."""
    run = folder / "killed"
    argv = jobs.flags(
        folder, "--commute", folder / "act.yaml", "--save", run, "--load", run, "--save-interval", 7
    )
    first, second = np.random.default_rng(7).integers([8, 22], [22, 40])
    for step in (first, second):
        with pytest.raises(RuntimeError, match="died without a word"):
            ranks.run(jobs.train, 2, [argv], int(step), timeout=200)
    ranks.run(jobs.train, 2, [argv], timeout=200)
    assert without_timing(run) == without_timing(folder / "act")
    whole = (run / record.NAME).read_bytes()
    ranks.run(jobs.train, 2, [argv], timeout=200)
    assert (run / record.NAME).read_bytes() == whole, (
        "a finished run that is started again only draws its report"
    )
    assert (run / "report.html").stat().st_size > 10_000
    kept = [
        json.loads(line)
        for file in run.glob("commute.jsonl.discarded-*")
        for line in file.read_text().splitlines()
    ]
    assert kept


def test_a_run_without_the_plug_in_is_taken_over_and_a_changed_mixture_needs_consent(folder):
    """Stock for 10 steps, attached for 10 more, then a budget moved from one domain to another with consent."""
    plain = folder / "taken"
    limits = {"iters": 30}
    first = jobs.write_mixture(folder, "first.yaml", mode="fixed", **limits)
    moved = jobs.write_mixture(folder, "moved.yaml", mode="fixed", **limits)
    text = Path(moved).read_text()
    assert "budget: 144" in text and "budget: 72" in text
    Path(moved).write_text(text.replace("budget: 144", "budget: 136").replace("budget: 72", "budget: 80"))
    saved = ["--save", plain, "--load", plain, "--save-interval", 10]
    ends = {
        "stock": (jobs.flags(folder, *saved, **limits), 11),
        "refused": (jobs.flags(folder, *saved, "--commute", first, **limits), None),
        "attached": (jobs.flags(folder, *saved, "--commute", first, "--commute-attach", **limits), 21),
        "changed": (jobs.flags(folder, *saved, "--commute", moved, **limits), None),
        "accepted": (jobs.flags(folder, *saved, "--commute", moved, "--commute-accept", **limits), None),
    }
    told = ranks.run(jobs.outcomes, 1, list(ends.values()), timeout=200)[0]
    outcome = dict(zip(ends, told, strict=True))
    assert outcome["stock"] == outcome["attached"] == "stopped"
    assert outcome["refused"] == outcome["changed"] == 2 and outcome["accepted"] == "finished"
    lines = record.read(plain)
    assert lines[0]["sample"] == 160 and "136" in " ".join(lines[0]["news"])
    assert list(lines[-1]["served"].values()) == [136, 24, 80]
    (earlier,) = plain.glob("commute.jsonl.discarded-1")
    before = json.loads(earlier.read_text().splitlines()[0])
    stock = Mixture(list(jobs.DOMAINS.values()))
    stock.skip(80)
    assert (
        before["sample"] == 80
        and ", ".join(f"{n} {c}" for n, c in zip(jobs.DOMAINS, stock.served, strict=True))
        in before["news"][0]
    )


def unlike(rank, argvs):
    """The outcome on this rank, which reads a mixture file of its own, and what it printed."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        return jobs.outcomes(rank, [(argvs[rank], None)]), told.getvalue()


def test_a_stale_mixture_file_on_one_rank_ends_the_run_before_a_model_is_built(folder):
    files = [
        jobs.write_mixture(folder, f"{name}.yaml", extra=extra)
        for name, extra in (("one", ""), ("two", "seed: 7"))
    ]
    argvs = [jobs.flags(folder, "--commute", file, "--save", folder / "unlike") for file in files]
    (code, told), (other, _) = ranks.run(unlike, 2, argvs, timeout=400)
    assert code == other == [2]  # said once a node
    assert "error: --commute: ranks differ in the mixture file: rank 0 " in told and files[1] in told
    assert not (folder / "unlike" / record.NAME).exists()
