"""Attention of a decoding step's token over its KV cache, with the output projection behind it.

The keys are split among workers as in Flash-Decoding (Dao et al.,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html), but nobody merges what they find: the
projection does, where it reads its input anyway.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, define_op
from torchtune_fused.ops.attention import has_kernel
from torchtune_fused.ops.attention_decode import attention_decode
from torchtune_fused.ops.decode_linear import check_tensors, decode_linear

# What is faster so: longer caches want more splits than the projection merges at once, and beside
# larger heads the kernels that read their weights ahead find no room on an SM.
_HEAD_DIM, _MOST_HEADS, _MOST_SLOTS = 64, 8, 8192


def decode_attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor,
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """``linear(attention_decode(q, k_cache, v_cache, length, mask), weight, bias) + residual``.

    On CUDA: fp16 or bf16, at most 16 tokens. One token with heads of 64 and a cache of at most 8192
    slots has kernels of its own; all else goes to those of :func:`attention_decode` and
    :func:`decode_linear`. There is no gradient.

    Args:
        q (Tensor): queries of shape ``[b, h, s, d]``, as ``decode_qkv`` returns them.
        k_cache (Tensor): keys, as in :func:`attention_decode`.
        v_cache (Tensor): values, likewise.
        length (Tensor): slots filled, likewise.
        weight (Tensor): weight of the projection, ``[n, h * d]``.
        bias (Tensor | None): its bias ``[n]``.
        residual (Tensor): what to add to the output, ``[b, s, n]``.
        mask (Tensor | None): as in :func:`attention_decode`.
        window (int | None): likewise.

    Returns:
        Tensor: shape ``[b, s, n]``.

    Raises:
        RuntimeError: on CUDA, for what the kernels don't take.
        TypeError: if a tensor has another dtype than ``q``.
        ValueError: if shapes or devices don't fit.
    """
    (b, h, s, d), h_kv, max_len = q.shape, *k_cache.shape[1:3]
    fits = b * s == 1 and d == _HEAD_DIM and h <= _MOST_HEADS * h_kv and max_len <= _MOST_SLOTS
    if not (fits and window is None and has_kernel(q, q.shape[-1])):
        return _reference(q, k_cache, v_cache, length, mask, weight, bias, residual, window)
    n = weight.shape[0]
    check_tensors(
        "decode_attend",
        q,
        v_cache=(v_cache, k_cache.shape),
        weight=(weight, (n, h * d)),
        bias=(bias, (n,)),
        residual=(residual, (1, 1, n)),
    )
    mask = None if mask is None else mask.contiguous()
    return torch.ops.torchtune_fused.decode_attend(
        q.contiguous(), k_cache, v_cache, length, mask, weight, bias, residual
    )


@define_op(
    "decode_attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor length, Tensor? mask, "
    "Tensor weight, Tensor? bias, Tensor residual) -> Tensor"
)
def _reference(q, k_cache, v_cache, length, mask, weight, bias, residual, window=None):
    seen = attention_decode(q, k_cache, v_cache, length, mask, window=window)
    return decode_linear(seen.transpose(1, 2).flatten(2), weight, bias, residual=residual)


@torch.library.register_fake("torchtune_fused::decode_attend", lib=LIBRARY)
def _(q, k_cache, v_cache, length, mask, weight, bias, residual):
    return torch.empty_like(residual)
