"""The ops of a decoding step as they run without a GPU: against torch's own layers, and opcheck."""

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import attention_decode, rope
from torchtune_fused.ops.decode_attend import decode_attend
from torchtune_fused.ops.decode_embed import decode_embed_
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import decode_linear
from torchtune_fused.ops.decode_qkv import decode_qkv

OPS = torch.ops.torchtune_fused


def test_embed():
    out, ids, weight = torch.empty(3, 24), torch.randint(10, (3,)), torch.randn(10, 24)
    decode_embed_(out, ids, weight)
    assert torch.equal(out, weight[ids])
    torch.library.opcheck(OPS.decode_embed_.default, (out, ids, weight))
    with pytest.raises(TypeError, match="ids must be int64"):
        decode_embed_(out, ids.int(), weight)
    with pytest.raises(ValueError, match="out must have shape"):
        decode_embed_(out[:2], ids, weight)


def test_linear():
    x, weight, bias, residual = (torch.randn(s) for s in [(3, 1, 24), (10, 24), (10,), (3, 1, 10)])
    scale = torch.rand(24)
    out = decode_linear(x, weight, bias, residual=residual, norm_weight=scale, eps=1e-5)
    expected = F.linear(F.rms_norm(x, (24,), scale, 1e-5), weight, bias) + residual
    torch.testing.assert_close(out, expected)
    torch.library.opcheck(OPS.decode_linear.default, (x, weight, bias, residual, scale, 1e-5, True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
def test_gated(activation):
    x, gate, up = (torch.randn(s) for s in [(2, 3, 24), (10, 24), (10, 24)])
    act = {
        "silu": F.silu,
        "gelu": F.gelu,
        "relu": F.relu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }[activation]
    out = decode_gated(x, gate, up, activation=activation)
    torch.testing.assert_close(out, act(x @ gate.T) * (x @ up.T))
    arguments = (x, gate, up, None, None, torch.rand(24), 1e-6, activation)
    torch.library.opcheck(OPS.decode_gated.default, arguments)


@pytest.mark.parametrize("norm_before_rope", [False, True])
def test_qkv_appends_to_the_cache(norm_before_rope):
    b, s, h, h_kv, d, k, max_len, start = 2, 3, 4, 2, 8, 24, 9, 4
    x, wq, wk, wv = (torch.randn(n) for n in [(b, s, k), (h * d, k), (h_kv * d, k), (h_kv * d, k)])
    caches = [torch.full((b + 1, h_kv, max_len, d), torch.nan) for _ in range(2)]
    cache_pos, scales = torch.arange(start, start + max_len), (torch.rand(d), torch.rand(d))
    tables = torch.rand(20, d // 2), torch.rand(20, d // 2)
    q = decode_qkv(
        x,
        wq,
        wk,
        wv,
        *caches,
        cache_pos,
        rope=tables,
        interleaved=False,
        head_norms=scales,
        norm_before_rope=norm_before_rope,
    )

    def expected(weight, scale):
        heads = (x @ weight.T).view(b, s, -1, d)
        if norm_before_rope:
            heads = F.rms_norm(heads, (d,), scale, 1e-6)
        heads = rope(heads, *tables, cache_pos[:s], interleaved=False)
        if not norm_before_rope:
            heads = F.rms_norm(heads, (d,), scale, 1e-6)
        return heads.transpose(1, 2)

    new = slice(start, start + s)
    values = (x @ wv.T).view(b, s, h_kv, d).transpose(1, 2)
    torch.testing.assert_close(q, expected(wq, scales[0]))
    torch.testing.assert_close(caches[0][:b, :, new], expected(wk, scales[1]))
    torch.testing.assert_close(caches[1][:b, :, new], values)
    for cache in caches:
        cache[:b, :, new] = torch.nan
        assert cache.isnan().all()
    assert cache_pos[0] == start

    arguments = (x, wq, wk, wv, None, None, None, None, 1e-6, *tables, None, True, None, None)
    torch.library.opcheck(OPS.decode_qkv.default, (*arguments, 1e-6, False, *caches, cache_pos))
    with pytest.raises(ValueError, match="the cache is full: 7 of 9"):
        decode_qkv(x, wq, wk, wv, *caches, cache_pos + 3)


@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_attention_and_its_projection(masked):
    h, h_kv, d, max_len, n = 4, 2, 64, 9, 10
    q, weight, bias, residual = (
        torch.randn(s) for s in [(1, h, 1, d), (n, h * d), (n,), (1, 1, n)]
    )
    caches, length = torch.randn(2, 1, h_kv, max_len, d), torch.tensor([7])
    mask = torch.arange(max_len).view(1, 1, -1) % 3 > 0 if masked else None
    out = decode_attend(q, *caches, length, weight, bias, residual=residual, mask=mask)
    seen = attention_decode(q, *caches, length, mask).flatten()
    torch.testing.assert_close(out.flatten(), F.linear(seen, weight, bias) + residual.flatten())
    arguments = (q, *caches, length, mask, weight, bias, residual)
    torch.library.opcheck(OPS.decode_attend.default, arguments)
    with pytest.raises(ValueError, match=r"got \[1, 1, 256\]"):
        decode_attend(q, *caches, length, weight[:, 1:], residual=residual)
