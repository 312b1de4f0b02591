import copy

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import KVCache, MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings
from torchtune.modules.peft import LoRALinear

from torchtune_fused.modules import FusedAttention, FusedRMSNorm

DIM, HEADS, KV_HEADS, HEAD_DIM, S, MAX_LEN = 48, 6, 2, 8, 11, 32


def attention(*, linear=nn.Linear, bias=False, rope=RotaryPositionalEmbeddings, norms=False, **kw):
    """A MultiHeadAttention of torchtune with random parameters, all of which matter."""

    def project(in_dim, out_dim):
        return (
            linear(in_dim, out_dim, bias=bias) if linear is nn.Linear else linear(in_dim, out_dim)
        )

    module = MultiHeadAttention(
        embed_dim=DIM,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=project(DIM, HEADS * HEAD_DIM),
        k_proj=project(DIM, KV_HEADS * HEAD_DIM),
        v_proj=project(DIM, KV_HEADS * HEAD_DIM),
        output_proj=project(HEADS * HEAD_DIM, DIM),
        pos_embeddings=rope and rope(HEAD_DIM, max_seq_len=MAX_LEN),
        q_norm=RMSNorm(HEAD_DIM) if norms else None,
        k_norm=RMSNorm(HEAD_DIM) if norms else None,
        max_seq_len=MAX_LEN,
        **kw,
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def pair(**kwargs):
    stock = attention(**kwargs)
    return FusedAttention.from_stock(copy.deepcopy(stock)), stock


def bool_mask(b=2, s=S, s_kv=S):
    """Random, with every query seeing something, and one row that sees nothing."""
    mask = torch.rand(b, s, s_kv) < 0.5
    mask[..., 0] = True
    mask[0, s // 2] = False
    return mask


def band(s, window):
    distance = torch.arange(s).unsqueeze(1) - torch.arange(s)
    return distance < window


def causal(s):
    return torch.ones(1, s, s, dtype=torch.bool).tril()


def documents(b, s):
    """A BlockMask of packed documents, and the dense mask it stands for."""
    ids = torch.randint(0, 3, (b, s)).sort().values

    def mask_mod(b, h, q, k):
        return (q >= k) & (ids[b, q] == ids[b, k])

    dense = torch.tensor(
        [
            [[q >= k and ids[i, q] == ids[i, k] for k in range(s)] for q in range(s)]
            for i in range(b)
        ]
    )
    return create_block_mask(mask_mod, b, None, s, s, device="cpu"), dense


def x(b=2, s=S):
    return torch.randn(b, s, DIM)


MASKS = {
    "none": lambda: None,
    "bool": bool_mask,
    "one for the batch": lambda: bool_mask(b=1),
    "additive": lambda: torch.randn(2, S, S),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "rope",
    [
        None,
        RotaryPositionalEmbeddings,
        Llama3ScaledRoPE,
        Qwen2RotaryPositionalEmbeddings,
        Phi3RotaryPositionalEmbeddings,
    ],
)
@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
def test_self_attention(mask, rope, norms, assert_same):
    fused, stock = pair(rope=rope, norms=norms, bias=norms)
    mask = MASKS[mask]()
    for input_pos in (None, torch.randint(MAX_LEN, (2, S)), torch.randint(MAX_LEN, (S,))):
        assert_same(fused, stock, [x()], lambda m, x, p=input_pos: m(x, x, mask=mask, input_pos=p))


@pytest.mark.parametrize("s", [1, 2, 31])
def test_lengths(s, assert_same):
    assert_same(*pair(), [x(3, s)], lambda m, x: m(x, x))


def test_block_mask(assert_same):
    # torchtune's way with a BlockMask needs a compiler or a GPU: the truth is the dense mask.
    block_mask, dense = documents(2, S)
    assert_same(
        *pair(),
        [x()],
        lambda m, x: m(x, x, mask=block_mask),
        lambda m, x: m(x, x, mask=dense),
    )


def test_not_causal(assert_same):
    assert_same(*pair(is_causal=False), [x()], lambda m, x: m(x, x))


def test_a_disabled_cache_hides_nothing(assert_same):
    # torchtune is causal by default only as long as no cache has been set up.
    fused, stock = pair()
    for module in (fused, stock):
        module.setup_cache(2, torch.float32, MAX_LEN)
        module.cache_enabled = False
    assert_same(fused, stock, [x()], lambda m, x: m(x, x))
    assert fused.kv_cache.size == 0


@pytest.mark.parametrize("mask", [None, bool_mask(2, S, 5)], ids=["none", "bool"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_cross_attention(mask, is_causal, assert_same):
    fused, stock = pair(rope=None, norms=True, is_causal=is_causal)
    assert_same(fused, stock, [x(), x(s=5)], lambda m, x, y: m(x, y, mask=mask))


@pytest.mark.parametrize("mask", [None, bool_mask()], ids=["none", "bool"])
def test_dropout_draws_the_same_numbers(mask, assert_same):
    fused, stock = pair(attn_dropout=0.4)
    assert_same(fused, stock, [x()], lambda m, x: m(x, x, mask=mask))
    dropped = fused(x(), x())
    assert not torch.equal(dropped, fused.eval()(x(), x()))
    assert_same(fused, stock.eval(), [x()], lambda m, x: m(x, x, mask=mask))


def test_lora(assert_same):
    fused, stock = pair(linear=lambda i, o: LoRALinear(i, o, rank=2, alpha=4))
    assert_same(fused, stock, [x()], lambda m, x: m(x, x))


class Shift(nn.Module):
    """Positional embeddings that are none of torchtune's."""

    def __init__(self, dim, max_seq_len):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(max_seq_len, 1, dim))

    def forward(self, x, *, input_pos=None):
        return x + self.shift[: x.shape[1]]


def test_positional_embeddings_of_another_kind(assert_same):
    assert_same(*pair(rope=Shift), [x()], lambda m, x: m(x, x))


@pytest.mark.parametrize(
    "name", ["", "q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "pos_embeddings"]
)
def test_hooks_fire(name, assert_same):
    fused, stock = pair(norms=True)
    calls = []
    for module in (fused, stock):
        part = module.get_submodule(name)
        part.register_forward_pre_hook(lambda m, args: calls.append("before"))
        part.register_forward_hook(lambda m, args, out: calls.append("after") or out * 2)
        part.register_full_backward_hook(lambda m, *grads: calls.append("backward"))
    assert_same(fused, stock, [x()], lambda m, x: m(x, x))
    half = len(calls) // 2
    assert calls[:half] == calls[half:] and half >= 3


def decode(module, tokens, masks, input_pos, lengths=(4, 1, 1, 2)):
    """The outputs of a prompt and some steps over the cache, joined."""
    outputs, start = [], 0
    for s in lengths:
        part = tokens[:, start : start + s]
        mask = None if masks is None else masks[:, start : start + s]
        outputs.append(module(part, part, mask=mask, input_pos=input_pos[..., start : start + s]))
        start += s
    return torch.cat(outputs, 1)


def left_padded(s, max_len):
    """Mask and positions of torchtune's generate for two prompts, the first with two pads."""
    mask = torch.ones(2, s, max_len, dtype=torch.bool).tril()
    mask[0, :, :2] = False
    mask[0, 0, 0] = mask[0, 1, 1] = True
    positions = torch.arange(s).expand(2, s).clone()
    positions[0] = (positions[0] - 2).clamp(min=0)
    return mask, positions


@pytest.mark.parametrize("rope", [RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings])
@pytest.mark.parametrize("grad", [False, True], ids=["", "with gradients"])
def test_decoding(rope, grad):
    fused, stock = pair(rope=rope, norms=True)
    tokens, (masks, positions) = x(s=8), left_padded(8, MAX_LEN)
    results = []
    for module in (fused, stock):
        module.setup_cache(2, torch.float32, MAX_LEN)
        with torch.set_grad_enabled(grad):
            results.append(decode(module, tokens, masks, positions))
    torch.testing.assert_close(*results)
    for name in ("k_cache", "v_cache", "cache_pos"):
        torch.testing.assert_close(getattr(fused.kv_cache, name), getattr(stock.kv_cache, name))
    fused.reset_cache()
    with torch.no_grad():
        torch.testing.assert_close(decode(fused, tokens, masks, positions), results[1].detach())


def test_decoding_does_not_read_unfilled_slots():
    fused, _ = pair()
    tokens, (masks, positions) = x(s=8), left_padded(8, MAX_LEN)
    results = []
    for fill in (0.0, torch.nan, 1e4):
        fused.kv_cache = None
        fused.setup_cache(2, torch.float32, MAX_LEN)
        fused.kv_cache.k_cache.fill_(fill)
        fused.kv_cache.v_cache.fill_(fill)
        with torch.no_grad():
            results.append(decode(fused, tokens, masks, positions))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_decoding_without_a_mask_is_causal():
    fused, stock = pair()
    tokens, positions = x(s=8), torch.arange(8)
    fused.setup_cache(2, torch.float32, MAX_LEN)
    with torch.no_grad():
        torch.testing.assert_close(decode(fused, tokens, None, positions), stock(tokens, tokens))


def test_a_cache_of_another_kind_is_updated_by_itself():
    class Recording(KVCache):
        updates = 0

        def update(self, k, v):
            self.updates += 1
            return super().update(k, v)

    fused, stock = pair()
    tokens, (masks, positions) = x(s=8), left_padded(8, MAX_LEN)
    for module in (fused, stock):
        module.kv_cache = Recording(2, MAX_LEN, KV_HEADS, HEAD_DIM, torch.float32)
        module.cache_enabled = True
    with torch.no_grad():
        outputs = [decode(m, tokens, masks, positions) for m in (fused, stock)]
    torch.testing.assert_close(*outputs)
    assert fused.kv_cache.updates == stock.kv_cache.updates == 4


def test_cross_attention_with_a_cache():
    fused, stock = pair(rope=None, is_causal=False)
    tokens, encoder, mask = x(), x(s=5), bool_mask(2, S, 9)
    outputs = []
    for module in (fused, stock):
        module.setup_cache(2, torch.float32, 9)
        with torch.no_grad():
            outputs.append(module(tokens, encoder, mask=mask))
            outputs.append(module(tokens[:, :1], None, mask=mask[:, :1]))  # what the cache holds
            outputs.append(module(tokens[:, :1], None))
    for ours, theirs in zip(outputs[:3], outputs[3:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_full_cache_is_an_error():
    fused, _ = pair()
    fused.setup_cache(2, torch.float32, 10)
    with torch.no_grad(), pytest.raises(ValueError, match="cache is full"):
        decode(fused, x(s=12), None, torch.arange(12), lengths=(8, 4))
    assert fused.kv_cache.size == 8


@pytest.mark.parametrize("window", [1, 3, S, 100])
def test_sliding_window(window, assert_same):
    fused, stock = pair()
    fused.sliding_window = window
    seen, mask, (block_mask, dense) = band(S, window), bool_mask(), documents(2, S)
    additive = torch.randn(2, S, S)
    for ours, theirs in (
        (None, causal(S) & seen),
        (mask, mask & seen),
        (block_mask, dense & seen),
        (additive, additive.masked_fill(~seen, -torch.inf)),
    ):
        assert_same(
            fused,
            stock,
            [x()],
            lambda m, x, mask=ours: m(x, x, mask=mask),
            lambda m, x, mask=theirs: m(x, x, mask=mask),
        )


@pytest.mark.parametrize("grad", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_sliding_window_over_the_cache(grad, masked):
    fused, stock = pair()
    fused.sliding_window = 3
    tokens, (masks, positions) = x(s=8), left_padded(8, MAX_LEN)
    if not masked:
        masks, positions = causal(8).expand(2, 8, 8), torch.arange(8)
    expected = stock(tokens, tokens, mask=masks[..., :8] & band(8, 3), input_pos=positions)
    fused.setup_cache(2, torch.float32, MAX_LEN)
    with torch.set_grad_enabled(grad):
        out = decode(fused, tokens, masks if masked else None, positions)
    torch.testing.assert_close(out, expected)


def test_sliding_window_with_dropout(assert_same):
    fused, stock = pair(attn_dropout=0.4)
    fused.sliding_window = 3
    seen = causal(S) & band(S, 3)
    assert_same(
        fused, stock, [x()], lambda m, x: m(x, x), lambda m, x: m(x, x, mask=seen.expand(2, S, S))
    )


def test_norm_before_rope():
    class NormThenRotate(nn.Module):
        def __init__(self, dim, max_seq_len):
            super().__init__()
            self.norm, self.rope = RMSNorm(dim), RotaryPositionalEmbeddings(dim, max_seq_len)

        def forward(self, x, *, input_pos=None):
            return self.rope(self.norm(x), input_pos=input_pos)

    stock = attention(rope=NormThenRotate)
    fused = FusedAttention.from_stock(copy.deepcopy(stock))
    positions = fused.pos_embeddings
    fused.q_norm = fused.k_norm = positions.norm
    fused.pos_embeddings = positions.rope
    fused.norm_before_rope = True
    tokens, weight = x(), torch.randn(2, S, DIM)
    outputs = [module(tokens, tokens) for module in (fused, stock)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        (out * weight).sum().backward()
    for ours, theirs in (
        (fused.q_norm.scale, stock.pos_embeddings.norm.scale),
        (fused.k_proj.weight, stock.k_proj.weight),
    ):
        # fp32, with the sum over all tokens in another order.
        atol = 1e-5 * theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=atol)


def test_constructor():
    stock = attention(norms=True)
    arguments = {
        name: getattr(stock, name)
        for name in (
            *("embed_dim", "num_heads", "num_kv_heads", "head_dim", "q_proj", "k_proj", "v_proj"),
            *("output_proj", "pos_embeddings", "q_norm", "k_norm", "max_seq_len"),
        )
    }
    fused = FusedAttention(**arguments)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    assert (fused.sliding_window, fused.norm_before_rope) == (None, False)
    with pytest.raises(ValueError, match="sliding_window must be at least 1, got 0"):
        FusedAttention(**arguments, sliding_window=0)


def test_longer_than_the_rotary_cache():
    fused, _ = pair()
    long = x(1, MAX_LEN + 1)
    with pytest.raises(ValueError, match="33 tokens, but cos and sin only 32 positions"):
        fused(long, long)


def test_neither_keys_nor_cache():
    fused, _ = pair()
    with pytest.raises(ValueError, match="needs y, or an enabled KV cache"):
        fused(x())


def test_shares_everything_with_the_stock_module(assert_same):
    stock = attention()
    fused = FusedAttention.from_stock(stock)
    stock.load_state_dict(attention().state_dict())
    stock.q_proj = LoRALinear(DIM, DIM, rank=2, alpha=4)
    stock.setup_cache(1, torch.float32, MAX_LEN)
    fused.cache_enabled = False
    assert fused.kv_cache is stock.kv_cache and not stock.cache_enabled
    assert_same(fused, stock, [x()], lambda m, x: m(x, x))
    stock.double()
    assert fused.v_proj.weight.dtype == torch.float64
    with pytest.raises(TypeError, match="takes a MultiHeadAttention, got FusedAttention"):
        FusedAttention.from_stock(fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    exact = attention(norms=True)
    stock = copy.deepcopy(exact).to(dtype)
    stock.pos_embeddings = exact.pos_embeddings  # its cache stays fp32, as torchtune builds it
    fused = FusedAttention.from_stock(copy.deepcopy(stock))
    fused.q_norm, fused.k_norm = map(FusedRMSNorm.from_stock, (fused.q_norm, fused.k_norm))
    tokens, mask = x().to(dtype), bool_mask()
    truth = copy.deepcopy(stock).float()(tokens.float(), *[tokens.float()], mask=mask)
    error, allowed = (
        (module(tokens, tokens, mask=mask).float() - truth).abs().max() for module in (fused, stock)
    )
    assert error <= 2 * allowed


def test_autocast():
    fused, stock = pair(norms=True)
    tokens = x()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(tokens, tokens), stock(tokens, tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        *({}, {"mask": bool_mask()}, {"input_pos": torch.arange(S)}),
        {"mask": documents(2, S)[0]},
    ],
    ids=["", "mask", "input_pos", "BlockMask"],
)
def test_compiles_without_graph_breaks(kwargs):
    fused, _ = pair(norms=True)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    tokens = x().requires_grad_()
    expected, out = (module(tokens, tokens, **kwargs) for module in (fused, compiled))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, [tokens, *fused.parameters()], grad),
        torch.autograd.grad(expected, [tokens, *fused.parameters()], grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
