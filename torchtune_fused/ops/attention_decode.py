"""Attention of the newest tokens over a KV cache whose fill is known on the device only.

Splitting the keys of one query among workers: Dao et al., Flash-Decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html. The length never leaves the device, so that
a step can be captured in a CUDA graph. Many queries, as those of a prompt, go to the kernels of
`attention` on CUDA.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    call,
    check_device,
    check_floating,
    check_tensor,
    define_op,
    unit_stride,
)
from torchtune_fused.ops.attention import (
    _flash,
    additive,
    closed_form,
    cpu_flash,
    has_kernel,
)
from torchtune_fused.ops.attention_mask import (
    MaskTiles,
    check_mask,
    check_window,
    dense_mask,
    mask_tiles,
)

# With up to so many queries the keys are split among workers; with more, the queries are.
FEW_QUERIES = 16


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    mask: Tensor | MaskTiles | None = None,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of the last ``s`` tokens of a KV cache over what the cache holds.

    The first ``length`` slots are filled, and query i belongs to slot ``length - s + i``. It sees
    the filled slots that ``mask`` allows or, without a mask, those up to its own; with ``window``
    only the last so many up to its own. Slots from ``length`` on have no influence, whatever they
    hold. A query that sees no slot gets zeros. There is no gradient.

    Args:
        q (Tensor): queries of shape ``[b, h, s, d]``, any strides.
        k_cache (Tensor): keys of shape ``[b', h_kv, max_len, d]``, ``b' >= b``: the first b rows
            are read. ``h_kv`` divides ``h``.
        v_cache (Tensor): values, as ``k_cache``.
        length (Tensor): int64 with one element on the device of ``q``, at least ``s``: slots
            filled, those of the queries included.
        mask (Tensor | MaskTiles | None): bool of shape ``[b or 1, s, max_len]``; True lets a query
            attend to a slot. Or what `mask_tiles` made of one.
        scale (float | None): factor of the scores. Default: ``d ** -0.5``.
        window (int | None): how many slots a query sees at most, counting back from its own.

    Returns:
        Tensor: shape ``[b, h, s, d]``, in memory ``[b, s, h, d]``, dtype of ``q``.

    Raises:
        RuntimeError: if a gradient would be needed.
        TypeError: if dtypes differ, ``mask`` is not bool or ``length`` not int64.
        ValueError: if shapes or devices don't fit, ``window < 1`` or, on the CPU, ``length`` is
            less than ``s`` or more than ``max_len``.
    """
    op = "attention_decode"
    if q.ndim != 4 or k_cache.ndim != 4:
        raise ValueError(
            f"{op}: q must have shape [b, h, s, d] and k_cache [b', h_kv, max_len, d], got "
            f"{list(q.shape)} and {list(k_cache.shape)}"
        )
    if q.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: has no gradient; call it under torch.no_grad()")
    (b, h, s, d), (capacity, h_kv, max_len, _) = q.shape, k_cache.shape
    check_floating(op, "q", q)
    check_tensor(op, "k_cache", k_cache, (capacity, h_kv, max_len, d), "q", q)
    check_tensor(op, "v_cache", v_cache, k_cache.shape, "q", q)
    if capacity < b:
        raise ValueError(f"{op}: k_cache has {capacity} rows, too few for a batch of {b}")
    if h % h_kv != 0:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of k_cache, got {h} and {h_kv}"
        )
    if not 1 <= s <= max_len:
        raise ValueError(f"{op}: q must have 1 to {max_len} tokens, as k_cache has slots, got {s}")
    if length.dtype != torch.int64 or length.numel() != 1:
        raise TypeError(
            f"{op}: length must be int64 with one element, got {length.dtype} of shape "
            f"{list(length.shape)}"
        )
    check_device(op, "length", length, "q", q)
    mask, kinds = check_mask(op, mask, q, max_len)
    window = check_window(op, window, max_len)
    scale = d**-0.5 if scale is None else scale
    q, k_cache, v_cache = unit_stride(q), unit_stride(k_cache), unit_stride(v_cache)
    if s > FEW_QUERIES and has_kernel(q, q.shape[-1]):
        if mask is not None and kinds is None:
            kinds, mask = mask_tiles(mask)
        return call("attention_prefill", q, k_cache, v_cache, length, mask, kinds, scale, window)
    mask = dense_mask(mask, kinds, max_len)
    return call("attention_decode", q, k_cache, v_cache, length, mask, scale, window)


def _cpu(q, k_cache, v_cache, length, mask, scale, window):
    (b, h, s, d), h_kv, length = q.shape, k_cache.shape[1], int(length)
    if not s <= length <= k_cache.shape[2]:
        raise ValueError(
            f"attention_decode: length must be at least {s}, the tokens of q, and at most "
            f"{k_cache.shape[2]}, the slots of k_cache, got {length}"
        )
    # Only the slots that some query may see take part.
    start = 0 if window is None else max(0, length - s + 1 - window)
    k, v = k_cache[:b, :, start:length], v_cache[:b, :, start:length]
    if mask is not None:
        mask = mask[..., start:length]
    if s > 1:
        return cpu_flash(q, k, v, mask, mask is None, scale, window)[0]
    # Every head of a group sees the same keys: as rows of one head, they read them once. And where
    # nothing is padded, one token's mask hides nothing, which is cheaper to see than to add.
    bias = None if mask is None or mask.all() else additive(mask, q.dtype)
    out, _ = _flash(q.view(b, h_kv, h // h_kv, d), k, v, attn_mask=bias, scale=scale)
    return out.reshape(b, 1, h, d).transpose(1, 2)


@define_op(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor length, Tensor? mask, "
    "float scale, int? window) -> Tensor",
    cpu=_cpu,
)
def _reference(q, k_cache, v_cache, length, mask, scale, window):
    # The host doesn't know the length: every slot takes part, the hidden ones masked, and the
    # unfilled ones zeroed, as zero times NaN would still be NaN.
    (b, _, s, _), max_len = q.shape, k_cache.shape[2]
    seen = visible_slots(length, s, max_len, mask is None, window)
    if mask is not None:
        seen = seen & mask
    empty = (torch.arange(max_len, device=q.device) >= length).unsqueeze(1)
    k, v = k_cache[:b].masked_fill(empty, 0), v_cache[:b].masked_fill(empty, 0)
    return closed_form(q, k, v, seen, None, None, False, scale, None, None)[0]


@define_op(
    "attention_prefill(Tensor q, Tensor k_cache, Tensor v_cache, Tensor length, Tensor? mask, "
    "Tensor? mask_kinds, float scale, int? window) -> Tensor"
)
def _prefill_reference(q, k_cache, v_cache, length, mask, kinds, scale, window):
    mask = dense_mask(mask, kinds, k_cache.shape[2])
    return _reference(q, k_cache, v_cache, length, mask, scale, window)


def visible_slots(length: Tensor, s: int, max_len: int, causal: bool, window: int | None) -> Tensor:
    """The slots which each of the last ``s`` of ``length`` tokens sees, ``[1, 1, s, max_len]``."""
    slots = torch.arange(max_len, device=length.device)
    own = (length - s + torch.arange(s, device=length.device)).unsqueeze(1)
    seen = slots <= own if causal else (slots < length).expand(s, max_len)
    if window is not None:
        seen = seen & (own - slots < window)
    return seen[None, None]


@torch.library.register_fake("torchtune_fused::attention_decode", lib=LIBRARY)
@torch.library.register_fake("torchtune_fused::attention_prefill", lib=LIBRARY)
def _(q, *_):
    b, h, s, d = q.shape
    return q.new_empty(b, s, h, d).transpose(1, 2)
