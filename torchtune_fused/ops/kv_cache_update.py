"""Appending keys and values to torchtune's KV cache, in place and without leaving the device."""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    call,
    check_device,
    check_shape,
    check_tensor,
    define_op,
)


def kv_cache_update(
    k_cache: Tensor, v_cache: Tensor, cache_pos: Tensor, k: Tensor, v: Tensor
) -> None:
    """Writes ``k`` and ``v`` to the next free slots of a cache, and advances its position.

    Args:
        k_cache (Tensor): keys of shape ``[b', h_kv, max_len, d]``, changed in place.
        v_cache (Tensor): values, as ``k_cache``.
        cache_pos (Tensor): int64 of shape ``[max_len]``, counting up from the first free slot, as
            in torchtune's ``KVCache``; ``s`` is added to it in place.
        k (Tensor): new keys of shape ``[b, h_kv, s, d]``, ``b <= b'``, for the first b rows.
        v (Tensor): new values, as ``k``.

    Raises:
        RuntimeError: if a gradient would be needed.
        TypeError: if dtypes differ.
        ValueError: if shapes or devices don't fit or, on the CPU, the cache is full.
    """
    check_cache("kv_cache_update", k_cache, v_cache, cache_pos, k, v)
    call("kv_cache_update", k_cache, v_cache, cache_pos, k, v)


def check_cache(
    op: str, k_cache: Tensor, v_cache: Tensor, cache_pos: Tensor, k: Tensor, v: Tensor
) -> None:
    """Raises unless a cache can take keys and values ``[b, h_kv, s, d]`` without a gradient."""
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise RuntimeError(f"{op}: has no gradient; call it under torch.no_grad()")
    capacity, h_kv, max_len, d = k_cache.shape
    b, _, s, _ = k.shape
    check_tensor(op, "v_cache", v_cache, k_cache.shape, "k_cache", k_cache)
    check_tensor(op, "k", k, (b, h_kv, s, d), "k_cache", k_cache)
    check_tensor(op, "v", v, k.shape, "k_cache", k_cache)
    check_shape(op, "cache_pos", cache_pos, (max_len,))
    check_device(op, "cache_pos", cache_pos, "k_cache", k_cache)
    if b > capacity:
        raise ValueError(f"{op}: the cache has {capacity} rows, too few for a batch of {b}")
    if s > max_len:
        raise ValueError(f"{op}: {s} tokens don't fit into a cache of {max_len} slots")


def update_on_cpu(k_cache, v_cache, cache_pos, k, v):
    b, s, start = k.shape[0], k.shape[2], int(cache_pos[0])
    if start + s > k_cache.shape[2]:
        raise ValueError(
            f"the KV cache is full: {start} of {k_cache.shape[2]} slots are taken, "
            f"{s} more are needed; set it up for a larger max_seq_len or reset it"
        )
    k_cache[:b, :, start : start + s] = k
    v_cache[:b, :, start : start + s] = v
    cache_pos.add_(s)


@define_op(
    "kv_cache_update(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) cache_pos, "
    "Tensor k, Tensor v) -> ()",
    cpu=update_on_cpu,
)
def update(k_cache, v_cache, cache_pos, k, v):
    b, s = k.shape[0], k.shape[2]
    slots = cache_pos[:s]
    k_cache[:b].index_copy_(2, slots, k)
    v_cache[:b].index_copy_(2, slots, v)
    cache_pos.add_(s)


@torch.library.register_fake("torchtune_fused::kv_cache_update", lib=LIBRARY)
def _(k_cache, v_cache, cache_pos, k, v):
    pass
