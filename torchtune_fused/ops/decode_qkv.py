"""Queries, keys and values of the new tokens of a decoding step, keys and values into the cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, check_device, check_shape, define_op
from torchtune_fused.ops.decode_linear import check_tensors, normed


def decode_qkv(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_pos: Tensor,
    *,
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | None = None,
    input_pos: Tensor | None = None,
    interleaved: bool = True,
    head_norms: tuple[Tensor, Tensor] | None = None,
    head_eps: float = 1e-6,
    norm_before_rope: bool = False,
) -> Tensor:
    """Projects ``norm(x)`` to heads, normalises and rotates them, and appends to a KV cache.

    Keys and values are written to slots ``cache_pos[0] + [0, s)``; ``cache_pos`` itself is left
    alone. As it counts up, ``cache_pos[s : s + 1]`` is then the `attention_decode` ``length``.
    On CUDA: fp16 or bf16, at most 16 tokens, ``k`` a multiple of 8, ``d`` a multiple of 16 up to
    256, and a token beyond the end of the cache is dropped. There is no gradient.

    Args:
        x (Tensor): input of shape ``[b, s, k]``.
        wq (Tensor): weight of shape ``[h * d, k]``, laid out as in ``nn.Linear``.
        wk (Tensor): weight of shape ``[h_kv * d, k]``.
        wv (Tensor): weight of shape ``[h_kv * d, k]``.
        k_cache (Tensor): keys of shape ``[b', h_kv, max_len, d]``, ``b' >= b``, changed in place.
        v_cache (Tensor): values, as ``k_cache``.
        cache_pos (Tensor): int64 of shape ``[max_len]``, counting up from the first free slot, as
            in torchtune's ``KVCache``.
        biases (tuple[Tensor, Tensor, Tensor] | None): biases of the three projections.
        norm_weight (Tensor | None): scale of shape ``[k]`` of an RMSNorm of ``x``; None: no norm.
        eps (float): epsilon of that norm.
        rope (tuple[Tensor, Tensor] | None): cosines and sines, fp32 of shape
            ``[max_seq_len, d / 2]``, any strides; None: no rotation.
        input_pos (Tensor | None): int64 position of each token, as ``[s]`` or ``[b, s]``. Default:
            the slot it is written to.
        interleaved (bool): whether pairs ``(2i, 2i + 1)`` are rotated, or ``(i, i + d / 2)``.
        head_norms (tuple[Tensor, Tensor] | None): scales of shape ``[d]`` of an RMSNorm over each
            head of the queries, and of the keys.
        head_eps (float): epsilon of those norms.
        norm_before_rope (bool): whether heads are normalised before they are rotated (Qwen3), or
            after (torchtune).

    Returns:
        Tensor: queries of shape ``[b, h, s, d]``, in memory ``[b, s, h, d]``.

    Raises:
        RuntimeError: on CUDA, for what the kernels don't take.
        TypeError: if a tensor has another dtype than ``x``.
        ValueError: if shapes or devices don't fit or, on the CPU, the cache is full.
    """
    op = "decode_qkv"
    if x.ndim != 3 or k_cache.ndim != 4:
        raise ValueError(
            f"{op}: x must have shape [b, s, k] and k_cache [b', h_kv, max_len, d], got "
            f"{list(x.shape)} and {list(k_cache.shape)}"
        )
    (b, s, k), (capacity, h_kv, max_len, d) = x.shape, k_cache.shape
    bq, bk, bv = biases or (None, None, None)
    q_norm, k_norm = head_norms or (None, None)
    check_tensors(
        op,
        x,
        wq=(wq, (wq.shape[0], k)),
        wk=(wk, (h_kv * d, k)),
        wv=(wv, (h_kv * d, k)),
        k_cache=(k_cache, (capacity, h_kv, max_len, d)),
        v_cache=(v_cache, k_cache.shape),
        bq=(bq, (wq.shape[0],)),
        bk=(bk, (h_kv * d,)),
        bv=(bv, (h_kv * d,)),
        norm_weight=(norm_weight, (k,)),
        q_norm=(q_norm, (d,)),
        k_norm=(k_norm, (d,)),
    )
    check_shape(op, "cache_pos", cache_pos, (max_len,))
    check_device(op, "cache_pos", cache_pos, "x", x)
    if wq.shape[0] % d:
        raise ValueError(f"{op}: wq must have whole heads of {d} rows, got {wq.shape[0]} rows")
    if capacity < b:
        raise ValueError(f"{op}: k_cache has {capacity} rows, too few for a batch of {b}")
    cos, sin = rope or (None, None)
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check_shape(op, name, table, (cos.shape[0], d // 2))
            check_device(op, name, table, "x", x)
    if input_pos is not None and input_pos.numel() not in (s, b * s):
        raise ValueError(
            f"{op}: input_pos must have {s} or {b} x {s} elements, one for each token of x, got "
            f"shape {list(input_pos.shape)}"
        )
    q = torch.ops.torchtune_fused.decode_qkv(
        x.contiguous(),
        wq,
        wk,
        wv,
        bq,
        bk,
        bv,
        norm_weight,
        eps,
        cos,
        sin,
        input_pos,
        interleaved,
        q_norm,
        k_norm,
        head_eps,
        norm_before_rope,
        k_cache,
        v_cache,
        cache_pos,
    )
    return q.transpose(1, 2)


@define_op(
    "decode_qkv(Tensor x, Tensor wq, Tensor wk, Tensor wv, Tensor? bq, Tensor? bk, Tensor? bv, "
    "Tensor? norm_weight, float eps, Tensor? cos, Tensor? sin, Tensor? input_pos, "
    "bool interleaved, Tensor? q_norm, Tensor? k_norm, float head_eps, bool norm_before_rope, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_pos) -> Tensor"
)
def _reference(
    x,
    wq,
    wk,
    wv,
    bq,
    bk,
    bv,
    norm_weight,
    eps,
    cos,
    sin,
    input_pos,
    interleaved,
    q_norm,
    k_norm,
    head_eps,
    norm_before_rope,
    k_cache,
    v_cache,
    cache_pos,
):
    b, s, _ = x.shape
    max_len, d = k_cache.shape[2:]
    if x.device.type == "cpu" and int(cache_pos[0]) + s > max_len:
        raise ValueError(
            f"decode_qkv: the cache is full: {int(cache_pos[0])} of {max_len} slots are taken, {s} "
            "more are needed; set it up for a larger max_seq_len or reset it"
        )
    x = normed(x, norm_weight, eps)
    slots = cache_pos[:s]
    positions = slots if input_pos is None else input_pos

    def heads(weight, bias):
        return F.linear(x, weight, bias).unflatten(-1, (-1, d))

    def turned(heads, norm):
        if norm_before_rope:
            heads = normed(heads, norm, head_eps)
        if cos is not None:
            heads = torch.ops.torchtune_fused.rope(heads, cos, sin, positions, interleaved, False)
        return heads if norm_before_rope else normed(heads, norm, head_eps)

    k_cache[:b].index_copy_(2, slots, turned(heads(wk, bk), k_norm).transpose(1, 2))
    v_cache[:b].index_copy_(2, slots, heads(wv, bv).transpose(1, 2))
    return turned(heads(wq, bq), q_norm).contiguous()


@torch.library.register_fake("torchtune_fused::decode_qkv", lib=LIBRARY)
def _(x, wq, *others):
    d = others[-3].shape[3]
    return x.new_empty((*x.shape[:-1], wq.shape[0] // d, d))
