import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules.peft import LoRALinear

from torchtune_fused.modules import MultiLayerPerceptron, MultiLayerPreceptron, OptimizedAttention

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [False, True], ids=["", "bias"])
def test_mlp(activation, use_bias):
    mlp = MultiLayerPerceptron(16, 24, activation, use_bias)
    x = torch.randn(2, 3, 16)
    hidden = ACTIVATIONS[activation](mlp.gate_proj(x)) * mlp.up_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(hidden))


def test_mlp_state_dict_and_names():
    assert MultiLayerPreceptron is MultiLayerPerceptron
    shapes = {name: tuple(p.shape) for name, p in MultiLayerPerceptron(16, 24).named_parameters()}
    assert shapes == {
        "gate_proj.weight": (24, 16),
        "up_proj.weight": (24, 16),
        "down_proj.weight": (16, 24),
    }
    assert MultiLayerPerceptron(16, 24, use_bias=True).up_proj.bias.shape == (24,)
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu, relu, got 'tanh'"):
        MultiLayerPerceptron(16, 24, "tanh")


def test_mlp_with_lora():
    mlp = MultiLayerPerceptron(16, 24)
    mlp.up_proj = LoRALinear(16, 24, rank=2, alpha=4)
    nn.init.normal_(mlp.up_proj.lora_b.weight)
    x = torch.randn(3, 16)
    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    torch.testing.assert_close(mlp(x), mlp.down_proj(hidden))


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_attention(masked):
    ours = OptimizedAttention(24, 3)
    theirs = nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    with torch.no_grad():
        weights = [p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]
        theirs.in_proj_weight.copy_(torch.cat(weights))
        theirs.out_proj.weight.copy_(ours.output_proj.weight)
    x = torch.randn(2, 7, 24)
    mask = torch.ones(7, 7, dtype=torch.bool).tril() if masked else None
    expected, _ = theirs(x, x, x, attn_mask=None if mask is None else ~mask)
    torch.testing.assert_close(ours(x, None if mask is None else mask[None]), expected)


def test_attention_of_uneven_heads():
    with pytest.raises(ValueError, match=r"n_heads \(5\) must divide d_model \(24\)"):
        OptimizedAttention(24, 5)
