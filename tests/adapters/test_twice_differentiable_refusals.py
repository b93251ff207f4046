"""What the twice differentiable context refuses by name, and that it puts everything back; without Megatron."""

import sys
import types

import pytest
import torch

from megatron_commute.adapters import twice_differentiable as twice_differentiable_module
from megatron_commute.adapters.twice_differentiable import refuse, twice_differentiable, verify


class Host(torch.nn.Linear):
    """A module with a config of Megatron's switches."""

    def __init__(self, **switches):
        super().__init__(2, 2)
        self.config = types.SimpleNamespace(**switches)


@pytest.mark.parametrize(
    ("switches", "text"),
    [
        ({"sequence_parallel": True}, "sequence parallelism"),
        ({"pipeline_model_parallel_size": 2}, "pipeline stages"),
        ({"context_parallel_size": 2}, "context parallelism"),
        ({"num_moe_experts": 4}, "mixture of experts"),
        ({"fp8": "hybrid"}, "FP8"),
    ],
)
def test_what_has_no_second_derivative_is_refused_by_name(switches, text):
    with pytest.raises(ValueError, match=f"{text}.*method: difference"):
        refuse(Host(**switches))
    refuse(Host(**{name: type(value)() for name, value in switches.items()}))


def test_transformer_engine_layers_are_refused_by_name():
    layer = type(
        "TELinear", (torch.nn.Linear,), {"__module__": "megatron.core.extensions.transformer_engine"}
    )(2, 2)
    with pytest.raises(ValueError, match="TELinear"):
        refuse(torch.nn.Sequential(layer))


def test_another_megatron_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.tensor_parallel.mappings", types.ModuleType("mappings"))
    with (
        pytest.raises(ValueError, match=r"no megatron\.core\.tensor_parallel"),
        twice_differentiable(Host()),
    ):
        raise AssertionError("entered")


def test_everything_is_put_back_after_an_error(monkeypatch):
    stock = {}
    for module, name in twice_differentiable_module._FUNCTIONS:
        if not any(module == known for known, _ in stock):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        stock[module, name] = object()
        monkeypatch.setattr(sys.modules[module], name, stock[module, name], raising=False)
    host = Host(bias_dropout_fusion=True, recompute_granularity="full")
    with pytest.raises(RuntimeError, match="probe"), twice_differentiable(host) as changed:
        assert changed == ["bias_dropout_fusion", "recompute_granularity"]
        assert vars(host.config) == {"bias_dropout_fusion": False, "recompute_granularity": None}
        assert all(getattr(sys.modules[m], n) is not s for (m, n), s in stock.items())
        with pytest.raises(RuntimeError, match="outside twice_differentiable"):
            verify(host, None, [], None)
        raise RuntimeError("a probe failed")
    assert vars(host.config) == {"bias_dropout_fusion": True, "recompute_granularity": "full"}
    assert all(getattr(sys.modules[m], n) is s for (m, n), s in stock.items())
