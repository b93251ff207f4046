"""The adapter for plain torch: losses at other weights, the metric, quiet modules, the host's blend, a loop of one's own."""

import json

import numpy as np
import oracles
import pytest
import torch
from indexed_files import LENGTH, VOCABULARY, write_domain
from torch.utils.checkpoint import checkpoint

from megatron_commute import hvp, reduce
from megatron_commute.adapters import metric, torch_loop
from megatron_commute.config import ConfigError, Run, holdout_parts
from megatron_commute.data import blend
from megatron_commute.data.indexed import drawer
from megatron_commute.record import log as record


def mean_loss(module, tokens):
    return oracles.cross_entropy(module(tokens[:, :-1]), tokens[:, 1:])


def gpt(dropout=0.0):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        oracles.GPT(VOCABULARY, 8, 2, 1, LENGTH, spread=0.2), torch.nn.Dropout(dropout)
    )


def batch():
    tokens, labels = oracles.batch(VOCABULARY, 3, LENGTH)
    return torch.cat([tokens, labels[:, -1:]], dim=1)


# --- the model of a probe -------------------------------------------------------------------------------------------


def test_losses_are_taken_at_given_weights_and_nothing_is_written():
    module, tokens = gpt(), batch()
    module[0].words.requires_grad_(False)  # frozen: not among the parameters, and still used
    model = torch_loop.probe_model(module, mean_loss, 2)
    before = [p.detach().clone() for p in module.parameters()]
    params = list(model.parameters())
    assert len(params) == len(before) - 1 and not any(p.requires_grad for p in params)
    doubled = [2 * p for p in params]
    slopes = hvp.gradient(lambda at: model.loss(at, tokens), doubled)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(module.parameters(), before, strict=True))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2 if p.requires_grad else 1)
    expected = torch.autograd.grad(
        mean_loss(module, tokens), [p for p in module.parameters() if p.requires_grad]
    )
    for got, want in zip(slopes, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_defaults_everything_is_owned_and_matrices_decay():
    model = torch_loop.probe_model(gpt(), mean_loss, 2)
    assert all(model.owned) and model.metric("identity") is None and not model.low_precision
    assert model.decayed == tuple(p.dim() > 1 for p in model.parameters()) and model.verify is None


def test_half_precision_weights_are_read_as_float32_copies():
    module = torch.nn.Linear(4, 1).bfloat16()
    model = torch_loop.probe_model(module, lambda m, x: m(x).square().mean(), 2)
    assert all(p.dtype is torch.float32 for p in model.parameters()) and model.low_precision
    params = list(model.parameters())
    assert torch.equal(params[0], module.weight.float())
    assert model.loss(params, torch.ones(2, 4)).dtype is torch.float32


def test_tied_weights_count_once():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    model = torch_loop.probe_model(module, lambda m, x: m(x).square().mean(), 2)
    (weight,), x = model.parameters(), torch.randn(3, 4)
    (slope,) = hvp.gradient(lambda at: model.loss(at, x), [weight])
    leaf = weight.clone().requires_grad_(True)
    (x @ leaf.T @ leaf.T).square().mean().backward()
    torch.testing.assert_close(slope, leaf.grad)


def test_models_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        torch_loop.probe_model(torch.nn.Linear(2, 2).requires_grad_(False), mean_loss, 2)


class Checkpointing(torch.nn.Module):
    """Recomputes its activations, always or in training only."""

    def __init__(self, always):
        super().__init__()
        self.one, self.two, self.always = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1), always

    def forward(self, x):
        def inner(y):
            return self.two(torch.tanh(self.one(y))).square().mean()

        return checkpoint(inner, x, use_reentrant=False) if self.always or self.training else inner(x)


def test_activation_checkpointing_is_refused_not_silently_wrong():
    """Its recomputation would see the weights of training: gradients at displaced weights would differ by nothing."""
    x = torch.randn(3, 4)
    for always in (True, False):
        model = torch_loop.probe_model(Checkpointing(always), lambda m, x: m(x), 2)
        params = list(model.parameters())
        with model.quiet("difference"):
            if always:
                with pytest.raises(RuntimeError, match=r"activation checkpointing.*switch it off"):
                    hvp.gradient(lambda at, model=model: model.loss(at, x), params)
            else:
                v = hvp.gradient(lambda at, model=model: model.loss(at, x), params)
                h = hvp.hessian_vector_product(lambda at, model=model: model.loss(at, x), params, v)
                assert sum(float(t.square().sum()) for t in h) > 0


# --- metric and quiet -----------------------------------------------------------------------------------------------


def test_metric_of_an_adam_optimiser_that_has_taken_steps():
    module, tokens = gpt(), batch()
    params = list(module.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99))
    model = torch_loop.probe_model(module, mean_loss, 2, lambda: torch_loop.second_moments(optimizer, params))
    with pytest.raises(ValueError, match="metric: identity"):
        model.metric("adam")
    squares = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    for _ in range(3):
        optimizer.zero_grad()
        mean_loss(module, tokens).backward()
        squares = [0.99 * s + 0.01 * p.grad.double() ** 2 for s, p in zip(squares, params, strict=True)]
        optimizer.step()
    kept = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
    roots = [(s / (1 - 0.99**3)).sqrt() for s in squares]
    floor = 0.1 * sum(float(r.sum()) for r in roots) / sum(r.numel() for r in roots)
    for got, root in zip(model.metric("adam"), roots, strict=True):
        torch.testing.assert_close(got.double(), 1 / (root + floor), rtol=1e-5, atol=0)
    assert all(torch.equal(optimizer.state[p]["exp_avg_sq"], k) for p, k in zip(params, kept, strict=True))
    largest = max(float(d.max()) for d in model.metric("adam"))
    assert largest <= 1 / floor * (1 + 1e-6), "rows that are never visited do not rule the metric"


def test_second_moments_of_zero_or_of_no_adam_are_no_metric():
    module = gpt()
    params = list(module.parameters())
    assert torch_loop.second_moments(torch.optim.SGD(params, lr=0.1), params) is None
    zeros = [torch.zeros_like(p) for p in params]
    with pytest.raises(ValueError, match="all second moments of the optimiser are zero"):
        metric.adam_metric(lambda: zeros, (True,) * len(params), None)


def test_quiet_puts_back_flags_and_random_state_even_after_an_exception():
    module = gpt(0.5)
    module[0].blocks[0].train(False)
    flags, state = [m.training for m in module.modules()], torch.get_rng_state()
    with pytest.raises(KeyError), torch_loop.quiet(module):
        assert not any(m.training for m in module.modules())
        torch.rand(3)
        raise KeyError
    assert [m.training for m in module.modules()] == flags and torch.equal(torch.get_rng_state(), state)


# --- the plug-in over indexed data ----------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(("en", "ru")):
        write_domain(tmp_path / name, 400, seed)
    return tmp_path


def mixture_file(folder, mode="act", more="", budgets=(72, 24), steps=24):
    budget = [f", budget: {b}" if mode != "shadow" else "" for b in budgets]
    text = f"""
domains:
  en: {{path: en, weight: 0.75{budget[0]}, holdout: 64}}
  ru: {{path: ru, weight: 0.25{budget[1]}, holdout: 64}}
mode: {mode}
every: 4
measure_budget: 1
probe: {{samples: 8, splits: 2}}
controller: {{law: tilt, confidence: 0.5, rate: 0.3}}
{more}
"""
    path = folder / "mixture.yaml"
    path.write_text(text)
    return str(path)


def own_loop(data, file, steps=24, workers=0, stop=None, resume=None, folder="run"):
    """What a user writes around the plug-in; returns hook, what was said and what the loader brought."""
    torch.manual_seed(0)
    plugin = torch_loop.Plugin(file, Run(LENGTH, 4, 2, 1, steps, 2 * workers))
    module = gpt(0.1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    params, said, brought, first = list(module.parameters()), [], [], 0
    if resume:
        first, weights, moments, kept = resume
        module.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    hook = plugin.attach(
        torch_loop.probe_model(module, mean_loss, 4, lambda: torch_loop.second_moments(optimizer, params)),
        reduce.Groups(), data / folder, lambda step: 1e-2, 0.01, vocab_size=VOCABULARY, say=said.append,
        state=json.loads(kept) if resume else None,
    )  # fmt: skip
    batches = iter(
        torch.utils.data.DataLoader(plugin.dataset, batch_sampler=plugin.sampler, num_workers=workers)
    )
    for step in range(first, stop or steps):
        hook.begin(step)
        parts = [next(batches), next(batches)]
        one = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = mean_loss(module, one["tokens"])
        loss.backward()
        optimizer.step()
        place = one["domain"].numpy(), one["position"].numpy()
        hook.end(np.full(4, loss.item()), one["tokens"].numpy(), place)
        brought += zip(*(p.tolist() for p in place), strict=True)
        hook.log_losses(step + 1)
    kept = (step + 1, module.state_dict(), optimizer.state_dict(), json.dumps(hook.state_dict()))
    return hook, said, brought, kept


def plain(folder):
    return [{k: v for k, v in line.items() if k != "timing"} for line in record.read(folder)]


def test_a_loop_of_ones_own_with_workers_and_the_shortest_lead(data):
    """lead = what two workers read ahead: weights change in time, and every sample is the one that the mixture drew."""
    hook, said, brought, _ = own_loop(data, mixture_file(data, more="lead: 10"), workers=2)
    lines = record.read(data / "run")
    assert [line["event"] for line in lines].count("probe") == 5
    assert any(line.get("effective_sample") for line in lines), [line.get("reason") for line in lines]
    assert hook.stream.served.tolist() == [72, 24] and not any("OTHER SAMPLES" in line for line in said)
    assert len(set(brought)) == 96, "no sample twice"
    with pytest.raises(ConfigError, match=r"lead.*9 samples, is less than the 10 samples"):
        torch_loop.Plugin(mixture_file(data, more="lead: 9"), Run(LENGTH, 4, 2, 1, 24, 4))


def test_resumed_in_a_new_process_with_other_workers_the_log_is_the_same(data):
    file = mixture_file(data, more="lead: 12")
    _, _, brought, _ = own_loop(data, file)
    for stop in (8, 11):  # before a probe, and with a change pending
        _, _, one, kept = own_loop(data, file, stop=stop, folder=f"parted{stop}", workers=1)
        _, _, two, _ = own_loop(data, file, resume=kept, folder=f"parted{stop}")
        assert one + two == brought and plain(data / f"parted{stop}") == plain(data / "run")


def test_planned_weights_are_followed_and_resumed(data):
    (data / "plan.csv").write_text("at,then,en,ru\n0,linear,1,0\n50%,hold,0.5,0.5\n")
    file = mixture_file(data, mode="fixed", more="schedule: plan.csv", budgets=(60, 36))
    hook, _, brought, _ = own_loop(data, file)
    assert hook.stream.served.tolist() == [60, 36]
    late = [domain for domain, _ in brought[48:]]
    assert late.count(1) == 24 and [domain for domain, _ in brought[:12]].count(1) <= 2
    _, _, one, kept = own_loop(data, file, stop=10, folder="parted")
    _, _, two, _ = own_loop(data, file, resume=kept, folder="parted")
    assert one + two == brought and plain(data / "parted") == plain(data / "run")


def test_bad_tokens_in_the_holdout_skip_probes_and_end_nothing(data):
    tokens = np.fromfile(data / "ru.bin", dtype=np.uint16)
    tokens[-64 * LENGTH :] = VOCABULARY + 5
    tokens.tofile(data / "ru.bin")
    hook, said, _, _ = own_loop(data, mixture_file(data))
    skips = [line for line in record.read(data / "run") if line["event"] == "skip"]
    assert (
        len(skips) == 3
        and hook.off
        and f"token {VOCABULARY + 5} is outside the vocabulary" in skips[0]["reason"]
    )
    assert any("prepare the data with the model's tokenizer" in line for line in said)


def test_holdouts_wrap_within_their_parts_and_parts_are_disjoint(data):
    plugin = torch_loop.Plugin(mixture_file(data), Run(LENGTH, 4, 2, 1, 24))
    draw = drawer(plugin.config, plugin.plan, LENGTH)
    stored = np.fromfile(data / "en.bin", dtype=np.uint16).astype(np.int64)
    parts = holdout_parts(64)
    for part, inside in (("gradient", parts.gradients), ("direction", parts.direction)):
        numbers = np.arange(2 * len(inside))
        tokens = draw(part, 0, numbers).numpy()
        assert (
            tokens.shape == (len(numbers), LENGTH + 1)
            and (tokens[: len(inside)] == tokens[len(inside) :]).all()
        )
        start = (400 - 64 + inside[0]) * LENGTH
        np.testing.assert_array_equal(tokens[0], stored[start : start + LENGTH + 1])
    assert not set(parts.gradients) & set(parts.direction)


def test_a_checkpoint_of_another_mixture_is_refused_until_it_is_accepted(data):
    _, _, _, kept = own_loop(data, mixture_file(data), stop=6)
    other = mixture_file(data, budgets=(60, 36), more="")
    with pytest.raises(ConfigError, match=r"budget of en was 72, it is 60.*--commute-accept"):
        own_loop(data, other, resume=kept)
    with pytest.raises(ConfigError, match=r"seed was 1234, it is 7; put it back"):
        own_loop(data, mixture_file(data, more="seed: 7"), resume=kept)
    plugin = torch_loop.Plugin(mixture_file(data, budgets=(72, 24)), Run(LENGTH, 8, 2, 1, 12))
    with pytest.raises(
        ConfigError, match=r"--global-batch-size: the checkpoint stands at sample 24, .* are 48"
    ):
        model = torch_loop.probe_model(gpt(), mean_loss, 2)
        plugin.attach(
            model, reduce.Groups(), data, lambda s: 1.0, 0.0, state=json.loads(kept[3]), consumed=6 * 8
        )


# --- the host's blend -----------------------------------------------------------------------------------------------


def test_shadow_mode_wants_the_blend_that_the_host_trains_on(data):
    file, run = mixture_file(data, mode="shadow"), Run(LENGTH, 4, 2, 1, 24)
    right = ["3", f"{data}/en", "1", f"{data}/ru"]
    assert torch_loop.Plugin(file, run, right).feeds is False
    wrong = {
        "weights": ["2", f"{data}/en", "1", f"{data}/ru"],
        "names": ["1", f"{data}/ru", "3", f"{data}/en"],
        "WEIGHT PREFIX pairs": [f"{data}/en", f"{data}/ru"],
        "not negative": ["-3", f"{data}/en", "4", f"{data}/ru"],
        "3 x y": ["3", "x", "y"],
    }
    for told, flags in wrong.items():
        with pytest.raises(ConfigError, match=told):
            torch_loop.Plugin(file, run, flags)
    assert torch_loop.Plugin(mixture_file(data), run, ["any", "thing", "goes"]).feeds, "it is replaced"
    (data / "two.yaml").write_text(
        "domains: {both: {path: [en, ru], weight: 1, holdout: 64}}\nprobe: {samples: 8}\n"
    )
    with pytest.raises(ConfigError, match="several files"):
        torch_loop.Plugin(str(data / "two.yaml"), run, ["1", f"{data}/en", "1", f"{data}/ru"])


def test_one_prefix_is_a_blend():
    assert blend.read(["x"]) == (["x"], [1.0])
    assert blend.read(["2", "x", "6", "y"]) == (["x", "y"], [2.0, 6.0])


@pytest.mark.parametrize("how", ["garbage", "gone", "no place", "a folder in its place"])
def test_nothing_in_the_closing_report_spoils_the_end_of_a_run(data, how, monkeypatch):
    """The run is trained and saved: what is wrong with its record or disk is told, and nothing is raised."""
    plugin, run = torch_loop.Plugin(mixture_file(data), Run(LENGTH, 4, 2, 1, 24)), data / "run"
    own_loop(data, mixture_file(data), stop=6)
    path, report = run / record.NAME, run / "report.html"
    if how == "garbage":
        path.write_bytes(b"garbage\n" + path.read_bytes())
    elif how == "gone":
        path.unlink()
    elif how == "no place":
        report.write_text("older")
        monkeypatch.setattr(
            "os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
    else:
        report.mkdir()
    told = plugin.summary(run)
    assert told.startswith("the report was not written: ") and f"later: megatron-commute report {run}" in told
    assert "\n" not in told and not list(run.glob(".report*"))
    assert how != "no place" or report.read_text() == "older"
