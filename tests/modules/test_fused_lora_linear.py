import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules.peft import LoRALinear

from torchtune_fused.modules import FusedLoRALinear

IN, OUT = 24, 40


def pair(**kwargs):
    stock = LoRALinear(IN, OUT, rank=3, alpha=4, **kwargs)
    nn.init.normal_(stock.lora_b.weight)
    return FusedLoRALinear.from_stock(copy.deepcopy(stock)), stock


def op_calls(module, x):
    """How often a call of the module runs the op."""
    with torch.profiler.profile() as profile:
        module(x)
    return sum(e.count for e in profile.key_averages() if e.key == "torchtune_fused::lora_linear")


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results(bias, dropout, training, assert_same):
    fused, stock = (m.train(training) for m in pair(use_bias=bias, dropout=dropout))
    for shape in ((2, 7, IN), (1, IN), (IN,)):
        assert_same(fused, stock, [torch.randn(shape)])
    assert op_calls(fused, torch.randn(1, IN)) == 1


def test_a_frozen_weight_gets_no_gradient(assert_same):
    fused, stock = pair()
    for module in (fused, stock):
        module.weight.requires_grad_(False)
    assert_same(fused, stock, [torch.randn(5, IN)])
    assert fused.weight.grad is None


def test_disabled_adapters_do_nothing():
    fused, stock = pair(use_bias=True)
    fused.disabled = stock.disabled = True
    x = torch.randn(5, IN)
    assert torch.equal(fused(x), stock(x))
    assert op_calls(fused, x) == 0


def test_state_is_that_of_the_stock_module():
    fused, stock = pair(use_bias=True)
    assert isinstance(fused, LoRALinear)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert fused.adapter_params() == stock.adapter_params()
    with pytest.raises(TypeError, match="takes a LoRALinear, got Linear"):
        FusedLoRALinear.from_stock(nn.Linear(2, 2))


def test_quantised_weights_run_as_in_torchtune():
    stock = LoRALinear(128, 128, rank=2, alpha=4, quantize_base=True)
    nn.init.normal_(stock.lora_b.weight)
    x = torch.randn(3, 128)
    assert torch.equal(FusedLoRALinear.from_stock(stock)(x), stock(x))


@pytest.mark.parametrize("name", ["lora_a", "lora_b", "dropout"])
def test_hooks_of_the_parts_fire(name, assert_same):
    fused, stock = pair(dropout=0.3)
    for module in (fused, stock):
        module.get_submodule(name).register_forward_hook(lambda m, args, out: out * 2)
    assert_same(fused, stock, [torch.randn(5, IN)])


def test_autocast():
    fused, stock = pair()
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), stock(x))


def test_activation_checkpointing(assert_same):
    fused, stock = pair(dropout=0.3)
    assert_same(
        fused,
        stock,
        [torch.randn(5, IN)],
        call=lambda module, x: checkpoint(module, x, use_reentrant=False),
        stock_call=lambda module, x: module(x),
    )


def test_compiles_without_graph_breaks():
    fused, _ = pair(use_bias=True)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, IN, requires_grad=True)
    torch.testing.assert_close(compiled(x), fused(x))
