import copy

import pytest
import torch
from torch import nn
from torchtune.modules import FeedForward, FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_fused.modules import FusedFeedForward

DIM, HIDDEN = 64, 96


def feed_forward(linear=nn.Linear, activation=None, gated=True, **kwargs):
    return FeedForward(
        gate_proj=linear(DIM, HIDDEN, **kwargs),
        up_proj=linear(DIM, HIDDEN, **kwargs) if gated else None,
        down_proj=linear(HIDDEN, DIM, **kwargs),
        activation=activation or nn.SiLU(),
    )


def dora(in_dim, out_dim):
    linear = DoRALinear(in_dim, out_dim, rank=2, alpha=4)
    linear.initialize_dora_magnitude()
    return linear


def pair(*args, **kwargs):
    stock = feed_forward(*args, **kwargs)
    return FusedFeedForward.from_stock(copy.deepcopy(stock)), stock


def op_calls(module, x, op="gated_mlp"):
    """How often a call of the module runs the op."""
    with torch.profiler.profile() as profile:
        module(x)
    return sum(e.count for e in profile.key_averages() if e.key == f"torchtune_fused::{op}")


def lora(in_dim, out_dim, **kwargs):
    linear = LoRALinear(in_dim, out_dim, rank=2, alpha=3, **kwargs)
    nn.init.normal_(linear.lora_b.weight)
    return linear


@pytest.mark.parametrize(
    "activation",
    [nn.SiLU(), nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh")],
    ids=["silu", "relu", "gelu", "gelu_tanh"],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_gated(activation, bias, assert_same):
    fused, stock = pair(activation=activation, bias=bias)
    for shape in ((2, 7, DIM), (1, DIM), (DIM,)):
        assert_same(fused, stock, [torch.randn(shape)])
    assert op_calls(fused, torch.randn(1, DIM)) == 1


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_adapters(bias, assert_same):
    fused, stock = pair(linear=lora, use_bias=bias)
    for shape in ((2, 7, DIM), (1, DIM), (DIM,)):
        assert_same(fused, stock, [torch.randn(shape)])
    assert op_calls(fused, torch.randn(1, DIM), "lora_gated_mlp") == 1


@pytest.mark.parametrize("linear", [nn.Linear, lora, dora])
@pytest.mark.parametrize("kind", ["same", "broadcast", "wider"])
def test_residual(linear, kind):
    fused, stock = pair(linear=linear)
    x, residual = torch.randn(2, 7, DIM), torch.randn(2, 7, DIM)
    if kind == "broadcast":
        residual = residual[0]
    elif kind == "wider":
        residual = residual.double()
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    expected = residual + stock(x)
    out = fused(x, residual=residual)
    assert out.dtype == expected.dtype
    # The tolerance of fp32, whatever the sum's dtype: that is what the products are in.
    torch.testing.assert_close(out.float(), expected.float())
    for ours, theirs in zip(
        *(torch.autograd.grad(t.sin().sum(), leaves) for t in (out, expected)), strict=True
    ):
        atol = 1e-5 * theirs.abs().max().item()  # their sums run in another order
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["dropout", "scale", "plain gate", "plain up"])
def test_adapters_that_are_not_one_op(case, assert_same):
    fused, stock = pair(linear=lora, dropout=0.3 if case == "dropout" else 0.0)
    for module in (fused, stock):
        if case == "scale":
            module.w3.alpha = 5
        elif case != "dropout":
            name = "w1" if case == "plain gate" else "w3"
            setattr(module, name, nn.Linear(DIM, HIDDEN))
            nn.init.ones_(module.get_submodule(name).weight)
            nn.init.zeros_(module.get_submodule(name).bias)
    assert_same(fused, stock, [torch.randn(2, 7, DIM)])
    assert op_calls(fused, torch.randn(1, DIM), "lora_gated_mlp") == 0


def test_disabled_adapters_do_nothing():
    fused, stock = pair(linear=lora)
    fused.w3.disabled = stock.w3.disabled = True
    x = torch.randn(5, DIM)
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gated": False},
        {"activation": nn.Tanh()},
        {"linear": dora},
    ],
    ids=["not gated", "tanh", "dora"],
)
def test_what_the_op_cannot_do_runs_as_in_torchtune(kwargs, assert_same):
    fused, stock = pair(**kwargs)
    assert_same(fused, stock, [torch.randn(2, 7, DIM)])
    assert op_calls(fused, torch.randn(1, DIM)) == 0


@pytest.mark.parametrize("as_subclass", [True, False], ids=["FrozenNF4Linear", "Linear"])
def test_quantised_weights(as_subclass):
    stock = FeedForward(
        gate_proj=nn.Linear(128, 128, bias=False),
        up_proj=FrozenNF4Linear(128, 128, bias=False),
        down_proj=nn.Linear(128, 128, bias=False),
    )
    if not as_subclass:
        up = nn.Linear(128, 128, bias=False)
        up.weight = nn.Parameter(stock.w3.weight, requires_grad=False)
        stock.w3 = up
    x = torch.randn(3, 128)
    assert torch.equal(FusedFeedForward.from_stock(stock)(x), stock(x))


@pytest.mark.parametrize("name", ["w1", "w2", "w3", "activation"])
def test_hooks_fire(name, assert_same):
    fused, stock = pair()
    x, calls = torch.randn(2, 7, DIM), []
    for module in (fused, stock):
        part = module.get_submodule(name)
        part.register_forward_hook(lambda m, args, out: calls.append("after") or out * 2)
        part.register_full_backward_hook(lambda m, *grads: calls.append("backward"))
    assert_same(fused, stock, [x])
    assert calls == ["after", "backward"] * 2


def test_global_hooks_fire():
    fused, _ = pair()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.append(m))
    try:
        fused(torch.randn(1, DIM))
    finally:
        handle.remove()
    assert {fused.w1, fused.w2, fused.w3} < set(called)


def test_parametrised_weights(assert_same):
    fused, stock = pair()
    for module in (fused, stock):
        nn.utils.parametrizations.weight_norm(module.w3)
    assert_same(fused, stock, [torch.randn(2, DIM)])


def test_a_forward_put_on_an_instance_is_called():
    fused, _ = pair()
    fused.w2.forward = lambda h: h.sum(-1)
    assert fused(torch.randn(2, DIM)).shape == (2,)


def test_autocast():
    fused, stock = pair()
    x = torch.randn(3, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), stock(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_shares_everything_with_the_stock_module(assert_same):
    stock = feed_forward()
    fused = FusedFeedForward.from_stock(stock)
    stock.load_state_dict(feed_forward().state_dict())
    stock.w1 = LoRALinear(DIM, HIDDEN, rank=2, alpha=4)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    assert_same(fused, stock, [torch.randn(2, DIM)])
    with pytest.raises(TypeError, match="takes a FeedForward, got Linear"):
        FusedFeedForward.from_stock(nn.Linear(2, 2))


@pytest.mark.parametrize("linear", [nn.Linear, lora])
def test_compiles_without_graph_breaks(linear):
    fused, _ = pair(linear=linear)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, DIM, requires_grad=True)
    torch.testing.assert_close(compiled(x), fused(x))
