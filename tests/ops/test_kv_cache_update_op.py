import pytest
import torch
from torchtune.modules import KVCache

from torchtune_fused.ops import kv_cache_update
from torchtune_fused.ops.kv_cache_update import update

MAX_LEN = 9


def cache(rows=2, dtype=torch.float32):
    return KVCache(rows, MAX_LEN, num_kv_heads=3, head_dim=4, dtype=dtype)


def state(kv_cache):
    return [b.clone() for b in (kv_cache.k_cache, kv_cache.v_cache, kv_cache.cache_pos)]


def tokens(s, rows=2):
    return torch.randn(rows, 3, s, 4), torch.randn(rows, 3, s, 4)


@pytest.mark.parametrize("run", [kv_cache_update, update], ids=["cpu", "reference"])
def test_as_torchtune(run):
    ours, stock = cache(), cache()
    for s in (4, 1, 1, 3):
        k, v = tokens(s)
        stock.update(k, v)
        run(ours.k_cache, ours.v_cache, ours.cache_pos, k, v)
        assert all(torch.equal(a, b) for a, b in zip(state(ours), state(stock), strict=True))


@pytest.mark.parametrize("run", [kv_cache_update, update], ids=["cpu", "reference"])
def test_a_batch_smaller_than_the_cache(run):
    kv_cache, (k, v) = cache(rows=5), tokens(2)
    run(kv_cache.k_cache, kv_cache.v_cache, kv_cache.cache_pos, k, v)
    assert torch.equal(kv_cache.k_cache[:2, :, :2], k)
    assert torch.equal(kv_cache.v_cache[:2, :, :2], v)
    assert not kv_cache.k_cache[2:].any()
    assert kv_cache.size == 2


def test_a_full_cache_is_an_error_and_stays_as_it_was():
    kv_cache = cache()
    buffers = kv_cache.k_cache, kv_cache.v_cache, kv_cache.cache_pos
    kv_cache_update(*buffers, *tokens(8))
    before = state(kv_cache)
    with pytest.raises(ValueError, match="full: 8 of 9 slots are taken, 2 more are needed"):
        kv_cache_update(*buffers, *tokens(2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(kv_cache), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 2, 1, 4)}, ValueError, r"k must have shape \[2, 3, 1, 4\]"),
        ({"v": torch.zeros(2, 3, 2, 4)}, ValueError, r"v must have shape \[2, 3, 1, 4\]"),
        ({"k": torch.zeros(2, 3, 1, 4).half()}, TypeError, "k must be torch.float32 as k_cache is"),
        ({"v_cache": torch.zeros(2, 3, 8, 4)}, ValueError, "v_cache must have shape"),
        ({"cache_pos": torch.arange(8)}, ValueError, r"cache_pos must have shape \[9\]"),
        ({"k": torch.zeros(3, 3, 1, 4), "v": torch.zeros(3, 3, 1, 4)}, ValueError, "2 rows"),
        ({"k": torch.zeros(2, 3, 10, 4), "v": torch.zeros(2, 3, 10, 4)}, ValueError, "9 slots"),
        ({"v": torch.zeros(2, 3, 1, 4, requires_grad=True)}, RuntimeError, "no gradient"),
    ],
)
def test_bad_arguments(change, error, message):
    kv_cache, (k, v) = cache(), tokens(1)
    arguments = {
        "k_cache": kv_cache.k_cache,
        "v_cache": kv_cache.v_cache,
        "cache_pos": kv_cache.cache_pos,
        "k": k,
        "v": v,
    }
    with pytest.raises(error, match=message):
        kv_cache_update(**{**arguments, **change})
    assert kv_cache.size == 0
