import pytest
import torch
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import KVCache, RMSNorm, RotaryPositionalEmbeddings

from torchtune_fused.ops import qk_norm_rope_append

B, H, H_KV, D, MAX_LEN, EPS = 2, 6, 2, 16, 12, 1e-5


def cache(rows=B, dtype=torch.float32):
    return KVCache(rows, MAX_LEN, num_kv_heads=H_KV, head_dim=D, dtype=dtype)


def buffers(kv_cache):
    return kv_cache.k_cache, kv_cache.v_cache, kv_cache.cache_pos


def heads(s, dtype=torch.float32):
    """Queries, keys and values as one projection leaves them."""
    joined = torch.randn(B, s, H + 2 * H_KV, D, dtype=dtype)
    return joined.split((H, H_KV, H_KV), dim=2)


def angles(rope):
    if isinstance(rope, RotaryPositionalEmbeddings):
        return rope.cache.unbind(-1)
    return rope.cache.chunk(4, -1)[::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("cls", [RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings])
def test_as_torchtune(cls, norm, dtype):
    rope, norms = cls(D, max_seq_len=2 * MAX_LEN), [RMSNorm(D, EPS) for _ in range(2)]
    for module in norms:
        torch.nn.init.normal_(module.scale)
    ours, stock = cache(dtype=dtype), cache(dtype=dtype)

    def placed(x, norm_module, input_pos):
        if norm == "before":
            x = norm_module(x)
        x = rope(x, input_pos=input_pos)
        return norm_module(x) if norm == "after" else x

    for s, input_pos in (
        (4, None),
        (1, torch.tensor([4])),
        (5, torch.randint(2 * MAX_LEN, (B, 5))),
        (2, torch.tensor([[10, 11]], dtype=torch.int32)),
    ):
        q, k, v = heads(s, dtype)
        # Exactly, and rounded once.
        exact = [placed(x.float(), n, input_pos) for x, n in zip((q, k), norms, strict=True)]
        stock.update(exact[1].to(dtype).transpose(1, 2), v.transpose(1, 2))
        with torch.no_grad():
            out = qk_norm_rope_append(
                *(q, k, v, *buffers(ours), *angles(rope), input_pos),
                interleaved=cls is RotaryPositionalEmbeddings,
                head_norms=None if norm == "none" else tuple(n.scale for n in norms),
                eps=EPS,
                norm_before_rope=norm == "before",
            )
        # By default: a rounding of fp32 sums that run in another order may turn one of the dtype.
        torch.testing.assert_close(out, exact[0].to(dtype))
        torch.testing.assert_close(ours.k_cache, stock.k_cache)
        assert torch.equal(ours.v_cache, stock.v_cache)
        assert torch.equal(ours.cache_pos, stock.cache_pos)


def test_a_batch_smaller_than_the_cache():
    kv_cache, (q, k, v) = cache(rows=5), heads(3)
    rope = RotaryPositionalEmbeddings(D, max_seq_len=MAX_LEN)
    qk_norm_rope_append(q, k, v, *buffers(kv_cache), *angles(rope), interleaved=True)
    torch.testing.assert_close(kv_cache.k_cache[:B, :, :3], rope(k).transpose(1, 2))
    assert not kv_cache.k_cache[B:].any() and not kv_cache.k_cache[:, :, 3:].any()
    assert kv_cache.size == 3


Q, K, V = heads(3)
COS, SIN = torch.rand(2, MAX_LEN, D // 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[..., :7]}, ValueError, "d even"),
        ({"k": K.half()}, TypeError, "k must be torch.float32 as q is"),
        ({"v": V[:, :2]}, ValueError, r"v must have shape \[2, 2, 3, 16\]"),
        ({"k": K[:, :, :1], "v": V[:, :, :1]}, ValueError, r"k must have shape \[2, 2, 3, 16\]"),
        ({"cos": COS[:2], "sin": SIN[:2]}, ValueError, "q has 3 tokens, but cos and sin only 2"),
        ({"input_pos": torch.tensor([0, 1, 99])}, ValueError, "positions from 0 to 99"),
        ({"head_norms": (COS[0], COS[0])}, ValueError, r"q_norm must have shape \[16\]"),
        ({"cache_pos": torch.arange(8)}, ValueError, r"cache_pos must have shape \[12\]"),
        ({"k_cache": torch.zeros(B, H_KV, MAX_LEN, D).half()}, TypeError, "v_cache must be"),
        ({"cache_pos": torch.arange(10, 22)}, ValueError, "full: 10 of 12 slots are taken, 3 more"),
        ({"v": V.clone().requires_grad_()}, RuntimeError, "no gradient"),
        ({"head_norms": torch.ones(2, D, requires_grad=True).unbind()}, RuntimeError, "gradient"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message):
    kv_cache = cache()
    names = "q", "k", "v", "k_cache", "v_cache", "cache_pos", "cos", "sin"
    arguments = dict(zip(names, (Q, K, V, *buffers(kv_cache), COS, SIN), strict=True))
    with pytest.raises(error, match=message):
        qk_norm_rope_append(**{**arguments, **change}, interleaved=True)
    assert kv_cache.size == 0
    assert not kv_cache.k_cache.any() and not kv_cache.v_cache.any()
