"""`qk_norm_rope` on the way into a KV cache: keys and values are read and written only once."""

from collections.abc import Callable

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op
from torchtune_fused.ops.kv_cache_update import check_cache, update, update_on_cpu
from torchtune_fused.ops.qk_norm_rope import check_heads, reference


def qk_norm_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_pos: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor | None = None,
    *,
    interleaved: bool,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    norm_before_rope: bool = False,
) -> Tensor:
    """Normalises and rotates heads, and appends the keys and the values to a KV cache.

    As `qk_norm_rope` and then `kv_cache_update`, in one pass.

    Args:
        q (Tensor): queries of shape ``[b, s, h, d]``, any strides.
        k (Tensor): keys of shape ``[b, s, h_kv, d]``, any strides, dtype of ``q``.
        v (Tensor): values, as ``k``.
        k_cache (Tensor): keys of shape ``[b', h_kv, max_len, d]``, ``b' >= b``, changed in place.
        v_cache (Tensor): values, as ``k_cache``.
        cache_pos (Tensor): int64 of shape ``[max_len]``, counting up from the first free slot, as
            in torchtune's ``KVCache``; ``s`` is added to it in place.
        cos (Tensor): cosines of shape ``[max_seq_len, d / 2]``, fp32, any strides.
        sin (Tensor): sines, as ``cos``.
        input_pos (Tensor | None): position of each token, int32 or int64, of any shape that can be
            read as ``[1, s]`` or ``[b, s]``. None means 0, 1, … s - 1, whatever the cache holds.
        interleaved (bool): whether pairs ``(2i, 2i + 1)`` are rotated, or ``(i, i + d / 2)``.
        head_norms (tuple[Tensor, Tensor] | None): scales of shape ``[d]``, of any floating dtype,
            of an RMSNorm over each head of the queries, and of the keys; None: no norm.
        eps (float): epsilon of those norms.
        norm_before_rope (bool): whether heads are normalised before they are rotated (Qwen3), or
            after (torchtune).

    Returns:
        Tensor: queries, contiguous, shape and dtype as given.

    Raises:
        RuntimeError: if a gradient would be needed.
        TypeError: if a tensor has a dtype of the wrong kind.
        ValueError: if shapes or devices don't fit, or if a position lies beyond ``max_seq_len`` or
            the cache is full (both are seen by the host on the CPU only; on CUDA a full cache ends
            the program by an assertion).
    """
    op = "qk_norm_rope_append"
    q_norm, k_norm = check_heads(op, q, k, cos, sin, input_pos, head_norms)
    check_cache(op, k_cache, v_cache, cache_pos, k.transpose(1, 2), v.transpose(1, 2))
    norms, angles = (q_norm, k_norm), (cos, sin, input_pos, eps, interleaved, norm_before_rope)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, *norms)):
        raise RuntimeError(f"{op}: has no gradient; call it under torch.no_grad()")
    return call(op, q, k, v, *norms, *angles, k_cache, v_cache, cache_pos)


def _append(update: Callable[..., None]) -> Callable[..., Tensor]:
    """The op, by the `kv_cache_update` of a device."""

    def run(q, k, v, q_norm, k_norm, *others):
        *angles, k_cache, v_cache, cache_pos = others
        q, k = reference(q, k, q_norm, k_norm, *angles, False)
        update(k_cache, v_cache, cache_pos, k.transpose(1, 2), v.transpose(1, 2))
        return q

    return run


define_op(
    "qk_norm_rope_append(Tensor q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, Tensor cos, "
    "Tensor sin, Tensor? input_pos, float eps, bool interleaved, bool norm_before_rope, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) cache_pos) -> Tensor",
    cpu=_append(update_on_cpu),
)(_append(update))


@torch.library.register_fake("torchtune_fused::qk_norm_rope_append", lib=LIBRARY)
def _(q, *_):
    return q.new_empty(q.shape)
