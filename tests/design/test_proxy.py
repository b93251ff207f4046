"""The proxy's training against torch's own optimiser, and its text against the files."""

import numpy as np
import pytest
import torch
from proxies import STEPS, mixture_file, run_of

from megatron_commute.design.model import Model, Shape
from megatron_commute.design.proxy import BETWEEN, Run, rates_of
from megatron_commute.design.text import Source, Text, epochs, vocabulary
from megatron_commute.settings.rates import RateSchedule, rates


@pytest.mark.parametrize(("flavour", "clip"), [("gpt2", 0.3), ("llama", 1e9)])
def test_training_is_that_of_torch_adamw(flavour, clip):
    run = run_of(flavour, clip=clip, decay=0.3)
    weights = np.tile(run.proxy.shares, (STEPS, 1))
    ours = run.advance(run.start(), weights, 0, STEPS).theta
    leaves = [p.clone().requires_grad_(True) for p in run.model.unflat(run.start().theta)]
    matrices, others = [p for p in leaves if p.dim() > 1], [p for p in leaves if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for step in range(STEPS):
        tokens, scale = run.weighted_batch(step, weights[step])
        optimizer.zero_grad()
        (run.model.sequence_losses(leaves, tokens) * scale).sum().backward()
        torch.nn.utils.clip_grad_norm_(leaves, clip)
        for group in optimizer.param_groups:
            group["lr"] = run.proxy.recipe.rates[step]
        optimizer.step()
    theirs = torch.cat([p.detach().reshape(-1) for p in leaves])
    assert (ours - theirs).abs().max() < 1e-9


def test_the_mean_of_the_last_part_is_that_of_its_every_fifth_step(monkeypatch):
    run, seen, update = run_of(), [], Run.update

    def noted(self, state, gradient, step):
        update(self, state, gradient, step)
        seen.append(state.theta.clone())

    monkeypatch.setattr(Run, "update", noted)
    state, mean = run.sampled([], averaged=0.5)
    assert torch.equal(state.theta, seen[-1])
    wanted = torch.stack(seen[STEPS // 2 + BETWEEN - 1 :: BETWEEN]).mean(0)
    assert (mean - wanted).abs().max() < 1e-12
    assert run.sampled([])[1] is None


def test_llama_is_that_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape(flavour="llama", layers=2, hidden=24, heads=2, sequence=8, vocabulary=32)
    model = Model(shape=shape, dtype=torch.float64)
    own = dict(zip(model.parts, model.unflat(model.initial(3) + 0.1), strict=True))
    about = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    inner = model.parts["0.up"][0]
    config = LlamaConfig(**about, intermediate_size=inner, rms_norm_eps=1e-5, attn_implementation="eager")
    theirs = LlamaForCausalLM(config).double()
    names = {"model.embed_tokens.weight": own["words"], "model.norm.weight": own["last.scale"]}
    names["lm_head.weight"] = own["logits"]
    for i in range(2):
        q, k, v = own[f"{i}.qkv"].chunk(3)
        layer = f"model.layers.{i}."
        names |= {f"{layer}self_attn.{n}_proj.weight": w for n, w in (("q", q), ("k", k), ("v", v))}
        names |= {f"{layer}self_attn.o_proj.weight": own[f"{i}.out"]}
        names |= {f"{layer}mlp.{n}_proj.weight": own[f"{i}.{n}"] for n in ("gate", "up", "down")}
        names |= {f"{layer}input_layernorm.weight": own[f"{i}.first.scale"]}
        names |= {f"{layer}post_attention_layernorm.weight": own[f"{i}.second.scale"]}
    theirs.load_state_dict(names)
    tokens = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(1))
    ours = model.sequence_losses(list(own.values()), tokens)
    logits = theirs(tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert (ours - losses.view(4, -1).mean(1)).abs().max() < 1e-7  # its rotary angles are float32


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "WSD"])
def test_rates_are_those_of_the_run_at_the_same_fraction(style):
    decay = {"lr_wsd_decay_iters": 2000} if style == "WSD" else {}
    long = RateSchedule(
        lr=2e-4, min_lr=2e-5, train_iters=10_000, lr_warmup_iters=500, lr_decay_style=style, **decay
    )
    found, own = rates_of(rates(long), 100, 1e-3), rates(long)
    assert found.max() == pytest.approx(1e-3)
    for step in (0, 30, 70, 95):
        middle = own[step * 100 + 49 : step * 100 + 51].mean() / own.max()
        assert found[step] / found.max() == pytest.approx(middle, rel=2e-2)


@pytest.fixture
def source(tmp_path, indexed_text):
    from megatron_commute.config import Run, load, resolve
    from megatron_commute.data.indexed import inspect_data

    domains = {
        "a": (indexed_text("a"), 1600, indexed_text("a_held")),
        "b": (indexed_text("b"), 400, indexed_text("b_held")),
    }
    config = load(str(mixture_file(tmp_path, domains, target={"b": 1})))
    run = Run(seq_length=32, global_batch=20, micro_batch=20, data_parallel=1, train_iters=100, prefetched=0)
    return Source(config=config, plan=resolve(config, run, *inspect_data(config, 32)), seq_length=32)


def test_sequences_are_pieces_of_the_runs_own(source):
    text = Text(source=source, sequence=16, vocabulary=64)
    found = text.drawn(0, 50, seed=3)
    assert len({tuple(row.tolist()) for row in found}) == 50
    pieces = set()
    for i in range(len(text.training[0])):
        tokens = text.training[0][i]["tokens"].tolist()
        pieces |= {tuple(tokens[:17]), tuple(tokens[16:])}
    assert all(tuple(row.tolist()) in pieces for row in found)
    assert not torch.equal(found, text.drawn(0, 50, seed=4))


def test_what_plans_never_judges(source):
    text = Text(source=source, sequence=16, vocabulary=64)
    plans, judges = ({tuple(row.tolist()) for row in text.held("b", judging)} for judging in (False, True))
    assert plans and judges and not plans & judges


def test_epochs_are_those_of_the_run(source):
    sizes, shares = source.plan.sizes, source.plan.shares
    np.testing.assert_allclose(epochs(source.plan), np.maximum(1, shares * 2000 / np.array(sizes)))


def test_rare_tokens_become_one(source):
    kept, known = vocabulary(source, 8)
    assert known == 8 and len(kept) == 7
    whole = Text(source=source, sequence=16, vocabulary=64).drawn(1, 200, seed=1)
    folded = Text(source=source, sequence=16, vocabulary=8, kept=kept).drawn(1, 200, seed=1)
    for new, old in enumerate(kept):
        assert torch.equal(folded == new, whole == old)
    assert vocabulary(source, 512)[0] == ()
