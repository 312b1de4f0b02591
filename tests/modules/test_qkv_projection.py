"""When attention projects queries, keys and values by one op, and that it makes no difference.

With rotary embeddings that op rotates and attends too.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import KVCache, MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_fused.modules import FusedAttention, FusedLoRALinear

DIM, HEADS, KV_HEADS, HEAD_DIM, S = 48, 6, 2, 8, 11


def plain(i, o):
    return nn.Linear(i, o, bias=False)


def lora(i, o, alpha=4, **kwargs):
    return LoRALinear(i, o, rank=2, alpha=alpha, **kwargs)


def pair(q, k=None, v=None, output=plain, **options):
    """A stock attention with random parameters, all of which matter, and ours with a copy."""
    k, v = k or q, v or q
    stock = MultiHeadAttention(
        embed_dim=DIM,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=q(DIM, HEADS * HEAD_DIM),
        k_proj=k(DIM, KV_HEADS * HEAD_DIM),
        v_proj=v(DIM, KV_HEADS * HEAD_DIM),
        output_proj=output(HEADS * HEAD_DIM, DIM),
        **options,
    )
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.3)
    return FusedAttention.from_stock(copy.deepcopy(stock)), stock


def self_attention(module, x):
    return module(x, x)


def op_calls(module, *inputs, op="qkv_linear", **kwargs):
    """How often a call of the module runs the op."""
    with torch.profiler.profile() as profile:
        module(*inputs, **kwargs)
    return sum(e.count for e in profile.key_averages() if e.key == f"torchtune_fused::{op}")


def x(b=2):
    return torch.randn(b, S, DIM, requires_grad=True)


@pytest.mark.parametrize(
    "kinds",
    [
        (plain,),
        (nn.Linear,),
        (lora, plain, lora),  # as torchtune's LoRA configs have it
        (lora,),
        (lambda i, o: lora(i, o, use_bias=True),),
        (lambda i, o: lora(i, o, dropout=0.3),),
        (lora, lora, lambda i, o: lora(i, o, dropout=0.3)),
        (lambda i, o: FusedLoRALinear.from_stock(lora(i, o)),),
    ],
    ids=["plain", "bias", "q and v", "lora", "lora bias", "dropout", "one drops", "patched"],
)
def test_results(kinds, assert_same):
    fused, stock = pair(*kinds)
    assert_same(fused, stock, [x()], self_attention)
    tokens = x()
    assert op_calls(fused, tokens, tokens) == 1


ROTARY = "rotary_self_attention"


def rotary(*kinds, rope=RotaryPositionalEmbeddings, **options):
    return pair(*kinds, pos_embeddings=rope(HEAD_DIM, max_seq_len=32), **options)


@pytest.mark.parametrize("rope", [RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings])
@pytest.mark.parametrize("kind", [plain, nn.Linear, lora, lambda i, o: lora(i, o, dropout=0.3)])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"input_pos": torch.randint(32, (2, S))},
        {"mask": torch.ones(2, S, S).tril(2).bool(), "input_pos": torch.randperm(S)},
        {"mask": create_block_mask(lambda b, h, q, k: q >= k - 1, 2, None, S, S, device="cpu")},
    ],
    ids=["causal", "positions", "mask", "block mask"],
)
def test_with_rotary_embeddings(rope, kind, arguments, assert_same):
    fused, stock = rotary(kind, rope=rope)
    dense = dict(arguments)
    if "mask" in arguments and not isinstance(arguments["mask"], torch.Tensor):
        dense["mask"] = torch.ones(2, S, S).tril(1).bool()
    tokens = x()
    assert_same(
        fused,
        stock,
        [tokens],
        call=lambda module, t: module(t, t, **arguments),
        stock_call=lambda module, t: module(t, t, **dense),
    )
    assert op_calls(fused, tokens, tokens, op=ROTARY, **arguments) == 1


@pytest.mark.parametrize("reason", ["norms", "dropout", "hook", "other tokens", "float mask"])
def test_what_runs_step_by_step(reason, assert_same):
    options, arguments = {}, {}
    if reason == "norms":
        options = {"q_norm": RMSNorm(HEAD_DIM), "k_norm": RMSNorm(HEAD_DIM)}
    if reason == "dropout":
        options = {"attn_dropout": 0.3}
    if reason == "float mask":
        arguments = {"mask": torch.randn(2, S, S)}
    fused, stock = rotary(plain, **options)
    if reason == "hook":
        for module in (fused, stock):
            module.pos_embeddings.register_forward_hook(lambda m, args, out: out * 2)

    def call(module, t):
        return module(t, t.clone() if reason == "other tokens" else t, **arguments)

    assert_same(fused, stock, [x()], call)
    tokens = x()
    other = tokens.clone() if reason == "other tokens" else tokens
    assert op_calls(fused, tokens, other, op=ROTARY, **arguments) == 0


def check_gradients(fused, stock, trained):
    """The parameters that ``trained`` names get torchtune's gradients, and no others get one."""
    tokens = x().detach()
    for module in (fused, stock):
        module(tokens, tokens).square().sum().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (ours.grad is not None) == (theirs.grad is not None) == trained(name), name
        if trained(name):
            # fp32 sums in another order, with an exp of 20 bits.
            scale = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5 * scale)


def test_a_frozen_base_gets_no_gradients():
    fused, stock = pair(lora)
    for module in (fused, stock):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora" in name)
    check_gradients(fused, stock, lambda name: "lora" in name)


def test_disabled_adapters_do_nothing():
    fused, stock = pair(lora)
    fused.k_proj.disabled = stock.k_proj.disabled = True
    check_gradients(fused, stock, lambda name: not name.startswith("k_proj.lora"))


@pytest.mark.parametrize(
    "kinds",
    [
        (lora, lambda i, o: lora(i, o, alpha=3)),
        (lora, lambda i, o: DoRALinear(i, o, rank=2, alpha=4)),
        (nn.Linear, lambda i, o: nn.Sequential(nn.Linear(i, o))),
    ],
    ids=["other factor", "DoRA", "not a linear layer"],
)
def test_what_runs_as_in_torchtune(kinds, assert_same):
    fused, stock = pair(*kinds)
    assert_same(fused, stock, [x()], self_attention)
    tokens = x()
    assert op_calls(fused, tokens, tokens) == 0


def test_hooks_fire(assert_same):
    fused, stock = pair(lora, plain)
    for module in (fused, stock):
        module.k_proj.register_forward_hook(lambda m, args, out: out * 2)
    assert_same(fused, stock, [x()], self_attention)


def test_keys_and_values_of_other_tokens(assert_same):
    fused, stock = pair(plain)
    assert_same(fused, stock, [x(), torch.randn(2, S, DIM)], lambda m, a, b: m(a, b))
    assert op_calls(fused, x(), x()) == 0


@pytest.mark.parametrize("make", [pair, rotary])
def test_inference_and_the_cache_call_the_layers(make):
    fused, _ = make(lora)
    tokens = x(1)
    with torch.no_grad():
        assert op_calls(fused, tokens, tokens) == op_calls(fused, tokens, tokens, op=ROTARY) == 0
        expected = fused(tokens, tokens)
        fused.kv_cache, fused.cache_enabled = KVCache(1, S, KV_HEADS, HEAD_DIM, torch.float32), True
        steps = [
            fused(t, t, input_pos=torch.tensor([i])) for i, t in enumerate(tokens.split(1, dim=1))
        ]
    # fp32 sums in another order.
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=1e-4)


def test_autocast():
    fused, stock = pair(plain)
    tokens = x()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (module(tokens, tokens) for module in (fused, stock))
    # bf16 has 8 bits; both compute in it, attention in another order.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-6 * theirs.abs().max().item())


@pytest.mark.parametrize("make", [pair, rotary])
def test_activation_checkpointing(make, assert_same):
    fused, stock = make(lambda i, o: lora(i, o, dropout=0.3))
    assert_same(
        fused,
        stock,
        [x()],
        call=lambda module, t: checkpoint(module, t, t, use_reentrant=False),
        stock_call=self_attention,
    )


@pytest.mark.parametrize("make", [pair, rotary])
@pytest.mark.parametrize("kind", [nn.Linear, lora])
def test_compiles_without_graph_breaks(make, kind):
    fused, _ = make(kind)
    inputs = torch.randn(2, S, DIM)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    results = []
    for module in (fused, compiled):
        tokens = inputs.clone().requires_grad_()
        module(tokens, tokens).square().sum().backward()
        results.append([tokens.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
