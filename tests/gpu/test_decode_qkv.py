import pytest
import torch

from torchtune_fused.ops.decode_qkv import _reference, decode_qkv

MAX_LEN = 37


def normal(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def rope_tables(head_dim, positions=64):
    angles = torch.rand(positions, head_dim // 2, device="cuda") * 6.28
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)  # as torchtune's cache lies
    return table[..., 0], table[..., 1]


def case(dtype, batch, steps, heads, kv_heads, d, k, *, bias, norms, start):
    """Arguments of the op, with a cache of poison but for the slots before `start`."""
    sizes = [heads * d, kv_heads * d, kv_heads * d]
    weights = [normal(n, k, dtype=dtype, scale=k**-0.5) for n in sizes]
    biases = [normal(n, dtype=dtype) if bias else None for n in sizes]
    head_norms = [normal(d, dtype=dtype) if norms else None for _ in range(2)]
    caches = []
    for _ in range(2):
        cache = torch.full((batch + 1, kv_heads, MAX_LEN, d), torch.nan, device="cuda", dtype=dtype)
        cache[:, :, :start] = normal(batch + 1, kv_heads, start, d, dtype=dtype)
        caches.append(cache)
    x = normal(batch, steps, k, dtype=dtype, scale=2.0)
    cache_pos = torch.arange(start, start + MAX_LEN, device="cuda")
    return x, weights, biases, normal(k, dtype=dtype), head_norms, caches, cache_pos


def run_reference(dtype, x, weights, biases, norm_weight, head_norms, caches, cache_pos, rest):
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    k_cache, v_cache = (c.to(dtype, copy=True) for c in caches)
    cos, sin, input_pos, interleaved, before = rest
    q = _reference(
        cast(x),
        *map(cast, weights),
        *map(cast, biases),
        cast(norm_weight),
        1e-5,
        cos,
        sin,
        input_pos,
        interleaved,
        *map(cast, head_norms),
        1e-6,
        before,
        k_cache,
        v_cache,
        cache_pos,
    )
    return q.transpose(1, 2), k_cache, v_cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch, steps", [(1, 1), (5, 1), (16, 1), (2, 3)])
@pytest.mark.parametrize(
    "heads, kv_heads, d, k",
    [
        (32, 8, 64, 2048),
        (9, 3, 64, 576),
        (7, 1, 128, 896),
        (8, 8, 80, 2560),
        (12, 3, 96, 1152),
        (4, 1, 256, 640),
        (8, 1, 128, 4096),
    ],
)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("kind", ["plain", "bias", "norm after", "norm before"])
def test_qkv(assert_as_exact, dtype, batch, steps, heads, kv_heads, d, k, interleaved, kind):
    start = 11
    x, *others, caches, cache_pos = case(
        dtype,
        batch,
        steps,
        heads,
        kv_heads,
        d,
        k,
        bias=kind == "bias",
        norms=kind.startswith("norm"),
        start=start,
    )
    weights, biases, norm_weight, head_norms = others
    cos, sin = rope_tables(d)
    input_pos = torch.randint(0, 64, (batch, steps), device="cuda") if kind == "bias" else None
    rest = (cos, sin, input_pos, interleaved, kind == "norm before")
    arguments = (x, weights, biases, norm_weight, head_norms, caches, cache_pos, rest)
    plain = run_reference(dtype, *arguments)
    truth = run_reference(torch.float64, *arguments)
    before = [c.clone() for c in caches]
    q = decode_qkv(
        x,
        *weights,
        *caches,
        cache_pos,
        biases=tuple(biases) if kind == "bias" else None,
        norm_weight=norm_weight,
        eps=1e-5,
        rope=(cos, sin),
        input_pos=input_pos,
        interleaved=interleaved,
        head_norms=tuple(head_norms) if kind.startswith("norm") else None,
        norm_before_rope=kind == "norm before",
    )
    assert_as_exact(q, plain[0], truth[0], dtype)
    new = slice(start, start + steps)
    for cache, old, low, exact in zip(caches, before, plain[1:], truth[1:], strict=True):
        written = (cache[:batch, :, new], low[:batch, :, new], exact[:batch, :, new])
        assert_as_exact(*written, dtype)
        cache[:batch, :, new] = old[:batch, :, new]
        assert torch.equal(cache.view(torch.int16), old.view(torch.int16))  # nothing else changed


def test_a_full_cache_is_not_written_past_its_end():
    x, weights, *_, caches, cache_pos = case(
        torch.bfloat16, 2, 1, 4, 2, 64, 128, bias=False, norms=False, start=MAX_LEN
    )
    before = [c.clone() for c in caches]
    decode_qkv(x, *weights, *caches, cache_pos)
    assert all(map(torch.equal, caches, before))


def test_bad_input_is_refused():
    x, weights, *_, caches, cache_pos = case(
        torch.bfloat16, 2, 1, 4, 2, 64, 128, bias=False, norms=False, start=0
    )
    with pytest.raises(RuntimeError, match="k_cache must be contiguous"):
        strided = caches[0].transpose(1, 2).contiguous().transpose(1, 2)
        decode_qkv(x, *weights, strided, caches[1], cache_pos)
    with pytest.raises(RuntimeError, match="cache_pos must be Long"):
        decode_qkv(x, *weights, *caches, cache_pos.int())
