import subprocess
import sys

import pytest
import torch
from torchtune.modules import KVCache

from torchtune_fused.ops import qk_norm_rope, qk_norm_rope_append

MAX_LEN = 300


def tables(d):
    angles = torch.rand(MAX_LEN, d // 2, device="cuda") * 6.28
    return angles.cos(), angles.sin()


def check(b, s, h, h_kv, d, dtype, norm, interleaved, rows=0):
    """The op against `qk_norm_rope` and the update of torchtune's cache, to the last bit."""
    ours, stock = (
        KVCache(b + rows, MAX_LEN, num_kv_heads=h_kv, head_dim=d, dtype=dtype).cuda()
        for _ in range(2)
    )
    cos, sin = tables(d)
    options = {
        "interleaved": interleaved,
        "head_norms": None if norm == "none" else tuple(torch.randn(2, d, device="cuda")),
        "norm_before_rope": norm == "before",
    }
    for steps in (s, 1, 17):
        # As a projection of queries, keys and values leaves them.
        heads = torch.randn(b, steps, h + 2 * h_kv, d, device="cuda").to(dtype)
        q, k, v = heads.split((h, h_kv, h_kv), dim=2)
        for input_pos in (None, torch.randint(MAX_LEN, (b, steps), device="cuda")):
            q_out, k_out = qk_norm_rope(q, k, cos, sin, input_pos, **options)
            if rows == 0:
                stock.update(k_out.transpose(1, 2), v.transpose(1, 2))
            else:
                slots = stock.cache_pos[:steps]
                stock.k_cache[:b].index_copy_(2, slots, k_out.transpose(1, 2))
                stock.v_cache[:b].index_copy_(2, slots, v.transpose(1, 2))
                stock.cache_pos.add_(steps)
            buffers = ours.k_cache, ours.v_cache, ours.cache_pos
            out = qk_norm_rope_append(q, k, v, *buffers, cos, sin, input_pos, **options)
            assert torch.equal(out, q_out)
            for name in ("k_cache", "v_cache", "cache_pos"):
                assert torch.equal(getattr(ours, name), getattr(stock, name)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize(
    "b, s, h, h_kv, d",
    [
        (1, 1, 1, 1, 64),
        (2, 127, 32, 8, 64),
        (10, 127, 32, 8, 64),  # so many tokens that a warp has all heads of one
        (3, 5, 7, 1, 80),
        (2, 31, 12, 3, 96),
        (2, 100, 32, 4, 128),
        (1, 17, 8, 8, 256),
        (2, 3, 4, 2, 2),  # pair by pair
        (1, 9, 3, 1, 18),
    ],
)
def test_as_the_two_alone(dtype, norm, interleaved, b, s, h, h_kv, d):
    check(b, s, h, h_kv, d, dtype, norm, interleaved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_batch_smaller_than_the_cache(dtype):
    check(2, 40, 6, 2, 64, dtype, "after", True, rows=3)


def test_a_captured_update_follows_the_cache():
    d, (cos, sin) = 64, tables(64)
    q, k, v = (torch.randn(1, 4, h, d, device="cuda").bfloat16() for h in (4, 2, 2))
    cache = KVCache(1, MAX_LEN, num_kv_heads=2, head_dim=d, dtype=torch.bfloat16).cuda()
    buffers = cache.k_cache, cache.v_cache, cache.cache_pos

    def run():
        return qk_norm_rope_append(q, k, v, *buffers, cos, sin, interleaved=True)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    assert cache.size == 16
    assert torch.equal(cache.v_cache[:, :, :16], v.transpose(1, 2).repeat(1, 1, 4, 1))
    assert not cache.v_cache[:, :, 16:].any()


def test_a_full_cache_ends_the_program():
    # In a process of its own: after a failed assertion a CUDA context can't be used any more.
    code = """
import torch
from torchtune_fused.ops import qk_norm_rope_append
q, k, v = (torch.randn(1, 3, 1, 64, device="cuda") for _ in range(3))
cache = torch.zeros(2, 1, 1, 7, 64, device="cuda")
angles = torch.zeros(2, 9, 32, device="cuda")
position = torch.arange(7, device="cuda")
for _ in range(3):
    qk_norm_rope_append(q, k, v, *cache, position, *angles, interleaved=True)
torch.cuda.synchronize()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode != 0
    assert "the KV cache is full" in result.stderr + result.stdout
