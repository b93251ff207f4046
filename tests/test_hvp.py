"""Hessian-vector products against curvlinops, float64 double backward and closed forms; the estimated error;
refusals."""

import functools
import math
import warnings

import oracles
import pytest
import torch
from oracles import gap, length
from torch import nn

from megatron_commute import hvp

VOCABULARY = 32
MODELS = {"mlp": None, "gpt": oracles.GPT, "llama": oracles.Llama}


def scaled(v, factor):
    return [factor * t for t in v]


class Mlp(nn.Module):
    """Tokens to logits with two tanh layers and no attention."""

    def __init__(self, width=16):
        super().__init__()
        self.words = nn.Parameter(torch.randn(VOCABULARY, width))
        self.inner, self.outer = nn.Linear(width, 24), nn.Linear(24, VOCABULARY)

    def forward(self, tokens):
        return self.outer(self.inner(self.words[tokens]).tanh())


@functools.cache
def model(kind, trained=False):
    torch.manual_seed(0)
    built = Mlp() if kind == "mlp" else MODELS[kind](VOCABULARY)
    return oracles.train(built, VOCABULARY) if trained else built


def case(kind, trained=False, seed=2, samples=4):
    """(loss, params, v): a batch of its own, and as v the gradient of another batch, as in a probe."""
    built = model(kind, trained)
    params = oracles.parameters(built)[1]
    loss = oracles.language_loss(built, *oracles.batch(VOCABULARY, samples, seed=seed))
    return (
        loss,
        params,
        hvp.gradient(
            oracles.language_loss(built, *oracles.batch(VOCABULARY, samples, seed=seed + 1)), params
        ),
    )


every_model = pytest.mark.parametrize("kind", MODELS)
trained_or_not = pytest.mark.parametrize("trained", [False, True])


class Flat(nn.Module):
    """A language model in the layout of nn.CrossEntropyLoss: logits [b, vocabulary, t]."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens):
        return self.inner(tokens).transpose(1, 2)


@every_model
@trained_or_not
def test_exact_equals_curvlinops(kind, trained):
    loss, params, v = case(kind, trained)
    flat, batch = Flat(model(kind, trained)), oracles.batch(VOCABULARY, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses what torch is about to drop
        from curvlinops import HessianLinearOperator

        weights = list(flat.parameters())
        operator = HessianLinearOperator(
            flat, nn.CrossEntropyLoss(), weights, [batch], check_deterministic=False
        )
        independent = operator @ v
    exact, truth = hvp.hessian_vector_product(loss, params, v, "exact"), oracles.product(loss, params, v)
    assert gap(exact, truth) < 4 * gap(independent, truth) < 1e-4  # both in float32
    double = hvp.hessian_vector_product(loss, [p.double() for p in params], v, "exact")
    assert gap(double, truth) < 1e-12


@every_model
@trained_or_not
def test_difference_with_its_own_step(kind, trained):
    loss, params, v = case(kind, trained)
    truth = oracles.product(loss, params, v)
    assert gap(hvp.hessian_vector_product(loss, params, v), truth) < 1e-3
    found = hvp.gradient_and_product(loss, params, v, check=True)
    assert gap(found.product, truth) < 3e-4
    assert gap(found.gradient, hvp.gradient(loss, params)) < 1e-4
    double = hvp.hessian_vector_product(loss, [p.double() for p in params], v)
    assert gap(double, truth) < 1e-8


def test_the_estimated_error_is_within_a_factor_of_three_in_95_percent_of_200_draws():
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for draw in range(200):
        kind, trained = ("mlp", "gpt", "llama")[draw % 3], draw % 2 == 1
        loss, params, v = case(kind, trained, seed=10 + draw, samples=2)
        v = scaled(v, 10 ** (6 * torch.rand(1, generator=generator).item() - 3) / length(v))
        found = hvp.gradient_and_product(loss, params, v, check=True)
        error = length(
            [a.double() - b for a, b in zip(found.product, oracles.product(loss, params, v), strict=True)]
        )
        ratios.append(found.error / error)
    assert sum(1 / 3 <= r <= 3 for r in ratios) >= 190


@every_model
@pytest.mark.parametrize("factor", [1 / 30, 30.0])
def test_the_estimate_at_a_given_step_holds_whether_rounding_or_truncation_rules(kind, factor):
    loss, params, v = case(kind, trained=True)
    step = factor * hvp.difference_step(params, v)
    found = hvp.gradient_and_product(loss, params, v, step=step, check=True)
    error = gap(found.product, oracles.product(loss, params, v)) * length(oracles.product(loss, params, v))
    assert found.step == step
    assert error / 5 < found.error < 5 * error


@every_model
@pytest.mark.parametrize("factor", [1 / 30, 30])
def test_tuning_finds_the_step_from_a_bad_start(kind, factor):
    loss, params, v = case(kind, trained=True)
    truth = oracles.product(loss, params, v)
    best = hvp.tuned_step(loss, params, v)[0]
    step, error = hvp.tuned_step(loss, params, v, start=factor * best)
    found = hvp.hessian_vector_product(loss, params, v, step=step)
    true_error = gap(found, truth)
    assert true_error < 3e-4
    assert true_error / 5 < error / length(truth) < 5 * true_error


def test_the_number_of_gradients_is_what_is_promised():
    loss, params, v = case("mlp")
    calls = []

    def counted(p):
        calls.append(1)
        return loss(p)

    best = hvp.tuned_step(loss, params, v)[0]
    for expected, options in ((2, {}), (2, {"step": best}), (4, {"step": best, "check": True})):
        calls.clear()
        hvp.gradient_and_product(counted, params, v, **options)
        assert len(calls) == expected
    calls.clear()
    hvp.tuned_step(counted, params, v, start=best)
    assert len(calls) in (8, 10)


@pytest.mark.parametrize("method", hvp.METHODS)
def test_parameters_are_left_alone_even_by_a_failing_loss(method):
    loss, params, v = case("gpt")
    before = [p.clone() for p in params]
    leaves = [nn.Parameter(p) for p in params]
    hvp.gradient_and_product(loss, leaves, v, method)
    with pytest.raises(RuntimeError, match="bad batch"):
        hvp.gradient_and_product(
            lambda p: (_ for _ in ()).throw(RuntimeError("bad batch")), leaves, v, method
        )
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(leaves, before, strict=True))


class Opaque(torch.autograd.Function):
    """A kernel with a backward of its own, as fused kernels have."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, slope):
        return slope * 2 * ctx.saved_tensors[0].detach()


def test_attention_kernels_without_second_derivative_are_replaced_by_the_math_form():
    x = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(0))

    def loss(p):
        return nn.functional.scaled_dot_product_attention(*p[0], is_causal=True).square().sum()

    v = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1))]
    assert (
        gap(
            hvp.hessian_vector_product(loss, [x], v, "exact"),
            hvp.hessian_vector_product(loss, [x.double()], v),
        )
        < 1e-5
    )


def test_unknown_kernels_are_refused_by_name_in_exact_only():
    x, v = [torch.randn(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"Opaque.*method: difference"):
        hvp.hessian_vector_product(lambda p: Opaque.apply(p[0]).sum(), x, v, "exact")
    found = hvp.hessian_vector_product(lambda p: Opaque.apply(p[0]).sum(), x, v, step=0.1)
    assert torch.allclose(found[0], torch.full((3,), 2.0), rtol=1e-4)


def test_the_step_follows_global_lengths_precision_and_the_size_of_the_weights():
    params, v = [torch.randn(100, generator=torch.Generator().manual_seed(0))], [torch.ones(100)]
    step = hvp.difference_step(params, v)
    assert step * 10 == pytest.approx(1.5e-3)
    assert hvp.difference_step(params, v, v_square=400.0) == pytest.approx(step / 2)
    assert hvp.difference_step(params, v, params_square=1e8) * 10 == pytest.approx(1e-2)
    assert hvp.difference_step(params, v, params_square=1e-4) * 10 == pytest.approx(1e-5)
    assert hvp.difference_step([torch.zeros(100)], v) * 10 == pytest.approx(1.5e-3)
    assert hvp.difference_step([params[0].double()], v) == pytest.approx(step * 2 ** (-29 / 3))


@pytest.mark.parametrize("method", hvp.METHODS)
def test_bad_input_is_refused(method):
    def loss(p):
        return p[0].square().sum()

    def product(loss, params, v):
        return hvp.gradient_and_product(loss, params, v, method)

    x = torch.ones(3)
    found = hvp.gradient_and_product(loss, [x, x], [x, x], method, step=0.5)
    assert not found.gradient[1].any() and not found.product[1].any(), "a parameter that is not used"
    assert torch.allclose(found.product[0], torch.full((3,), 2.0), rtol=1e-4)
    with pytest.raises(ValueError, match="v is zero"):
        product(loss, [x], [torch.zeros(3)])
    with pytest.raises(FloatingPointError if method == "exact" else ValueError, match="not finite"):
        product(loss, [x], [torch.full((3,), math.nan)])
    with pytest.raises(ValueError, match=r"differ at tensor 0: shapes \(3,\) and \(2,\)"):
        product(loss, [x], [torch.ones(2)])
    with pytest.raises(ValueError, match="1 and 2 tensors"):
        product(loss, [x], [x, x])
    with pytest.raises(ValueError, match="no trainable parameter"):
        product(loss, [], [])
    with pytest.raises(ValueError, match="depends on no parameter"):
        product(lambda p: torch.ones(()), [x], [x])
    with pytest.raises(FloatingPointError, match=r"gradient is not finite in tensors \[0\]"):
        product(lambda p: (p[0] * math.inf).sum(), [x], [x])
    with pytest.raises(ValueError, match="unknown method 'fast': choose one of difference, exact"):
        hvp.hessian_vector_product(loss, [x], [x], "fast")
    with pytest.raises(ValueError, match="float32 copies"):
        hvp.difference_step([x.bfloat16()], [x])
