"""Exact attention with grouped heads, any boolean mask and a sliding window; differentiable.

Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; Ainslie et al., GQA,
https://arxiv.org/abs/2305.13245. On the CPU the work is done by ATen's flash attention; elsewhere,
until a kernel is registered, by the closed form at the end of this file.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_device,
    check_floating,
    check_tensor,
    define_op,
    register_autograd,
    unit_stride,
)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention of queries over keys and values.

    Key j is visible to query i if ``mask`` says so, and, with ``causal``, ``j <= i``, and, with
    ``window``, ``i - j < window``, where the last query stands at the last key. A query that sees
    no key gets zeros, and passes zero gradients.

    Args:
        q (Tensor): queries of shape ``[b, h, s, d]``, any strides.
        k (Tensor): keys of shape ``[b, h_kv, s_kv, d]``, where ``h_kv`` divides ``h``: query head i
            reads key head ``i // (h / h_kv)``.
        v (Tensor): values, as ``k``.
        mask (Tensor | None): bool of shape ``[b or 1, s, s_kv]`` or
            ``[b or 1, h or 1, s, s_kv]``; True lets a query attend to a key.
        causal (bool): whether keys after a query are hidden from it. Needs ``s == s_kv``.
        scale (float | None): factor of the scores. Default: ``d ** -0.5``.
        window (int | None): how many keys a query sees at most, counting back from its own.

    Returns:
        Tensor: shape ``[b, h, s, d]``, in memory ``[b, s, h, d]``, dtype of ``q``.

    Raises:
        TypeError: if dtypes differ or ``mask`` is not bool.
        ValueError: if shapes or devices don't fit, or ``window < 1``.
    """
    check_qkv("attention", q, k, v)
    s, s_kv = q.shape[2], k.shape[2]
    if causal and s != s_kv:
        raise ValueError(f"attention: causal needs as many queries as keys, got {s} and {s_kv}")
    mask = check_mask("attention", mask, q, s_kv)
    window = check_window("attention", window, s_kv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return call("attention", q, k, v, mask, causal, scale, window)[0]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of every query to every key, ``[b, h, s, d]`` each; see `attention`."""
    return attention(q, k, v, scale=scale)


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v are ``[b, h, s, d]`` and ``[b, h_kv, s_kv, d]`` twice."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"{op}: q, k and v must have shape [b, heads, s, d], got {list(q.shape)} for q and "
            f"{list(k.shape)} for k"
        )
    (b, h, s, d), (_, h_kv, s_kv, _) = q.shape, k.shape
    check_floating(op, "q", q)
    check_tensor(op, "k", k, (b, h_kv, s_kv, d), "q", q)
    check_tensor(op, "v", v, k.shape, "q", q)
    if h % h_kv != 0:
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of k, got {h} and {h_kv}"
        )
    if s == 0 or s_kv == 0:
        raise ValueError(f"{op}: q and k must have at least one token each")


def check_mask(op: str, mask: Tensor | None, q: Tensor, s_kv: int) -> Tensor | None:
    """The mask as ``[b or 1, h or 1, s, s_kv]``, or raises."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool (True attends), got {mask.dtype}")
    check_device(op, "mask", mask, "q", q)
    full = mask.unsqueeze(1) if mask.ndim == 3 else mask
    b, h, s, _ = q.shape
    if (
        full.ndim != 4
        or full.shape[0] not in (1, b)
        or full.shape[1] not in (1, h)
        or full.shape[2:] != (s, s_kv)
    ):
        raise ValueError(
            f"{op}: mask must have shape [{b} or 1, {s}, {s_kv}] or "
            f"[{b} or 1, {h} or 1, {s}, {s_kv}], got {list(mask.shape)}"
        )
    return full


def check_window(op: str, window: int | None, s_kv: int) -> int | None:
    """The window, None where it hides nothing, or raises."""
    if window is None:
        return None
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    return window if window < s_kv else None


def visible(
    s: int, s_kv: int, mask: Tensor | None, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """All that hides keys as one bool tensor which broadcasts to ``[b, h, s, s_kv]``, or None."""
    if not causal and window is None:
        return mask
    distance = torch.arange(s_kv - s, s_kv, device=device).unsqueeze(1)
    distance = distance - torch.arange(s_kv, device=device)
    if not causal:
        band = distance < window
    elif window is None:
        band = distance >= 0
    else:
        band = (distance >= 0) & (distance < window)
    return band[None, None] if mask is None else mask & band


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the term that ATen adds to the scores: 0 where it is True, else -inf."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def as_bshd(x: Tensor) -> Tensor:
    """``[b, h, s, d]`` laid out in memory as ``[b, s, h, d]``: merging heads needs no copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_flash(q, k, v, mask, causal, scale, window):
    """Attention by ATen's flash attention for the CPU, which reads grouped heads in place."""
    bias, causal = _cpu_mask(q, k, mask, causal, window)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return as_bshd(out), lse.contiguous()


def _cpu_flash_backward(grad, q, k, v, out, lse, mask, causal, scale, window):
    bias, causal = _cpu_mask(q, k, mask, causal, window)
    grads = _flash_backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    return tuple(as_bshd(t) for t in grads)


def _cpu_mask(q, k, mask, causal, window):
    """What ATen takes: a term to add to the scores, or its own causal mask, which skips work."""
    s, s_kv = q.shape[2], k.shape[2]
    if causal and mask is None and window is None and s == s_kv:
        return None, True
    seen = visible(s, s_kv, mask, causal, window, q.device)
    return (None if seen is None else additive(seen, q.dtype)), False


# lse is log(sum(exp(scores))) in fp32, natural logarithm of scaled scores; 0 where no key is seen.
@define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, int? window) "
    "-> (Tensor out, Tensor lse)",
    cpu=cpu_flash,
)
def closed_form(q, k, v, mask, causal, scale, window):
    """Attention by its definition, with the scores in memory; the reference of every device."""
    b, h, s, d = q.shape
    scores = _scores(q, k, mask, causal, scale, window)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill_(lse == -torch.inf, 0.0)
    out = (scores - lse.unsqueeze(-1)).exp_() @ at_least_fp32(v).unsqueeze(2)
    return as_bshd(out.view(b, h, s, d).to(q.dtype)), lse.view(b, h, s)


@define_op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? mask, bool causal, float scale, int? window) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    cpu=_cpu_flash_backward,
)
def closed_form_backward(grad, q, k, v, out, lse, mask, causal, scale, window):
    """Gradients of attention from its output and log-sum-exp; the reference of every device."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    probs = _scores(q, k, mask, causal, scale, window)
    probs = probs.sub_(lse.unflatten(1, groups).unsqueeze(-1)).exp_()
    grad, out, q_ = (at_least_fp32(t).unflatten(1, groups) for t in (grad, out, q))
    k_, v_ = at_least_fp32(k).unsqueeze(2), at_least_fp32(v).unsqueeze(2)
    grad_v = (probs.mT @ grad).sum(2)
    grad_scores = (grad @ v_.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(probs).mul_(scale)
    grad_q = (grad_scores @ k_).flatten(1, 2)
    grad_k = (grad_scores.mT @ q_).sum(2)
    return tuple(as_bshd(t.to(q.dtype)) for t in (grad_q, grad_k, grad_v))


def _scores(q, k, mask, causal, scale, window):
    # [b, h_kv, h / h_kv, s, s_kv]: the heads of a group meet their key head without expanding it.
    b, h, s, _ = q.shape
    h_kv, s_kv = k.shape[1:3]
    grouped = at_least_fp32(q).unflatten(1, (h_kv, h // h_kv))
    scores = (grouped @ at_least_fp32(k).unsqueeze(2).mT).mul_(scale)
    seen = visible(s, s_kv, mask, causal, window, q.device)
    if seen is not None:
        scores.view(b, h, s, s_kv).masked_fill_(~seen, -torch.inf)
    return scores


@torch.library.register_fake("torchtune_fused::attention", lib=LIBRARY)
def _(q, k, v, mask, causal, scale, window):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like_bshd(q), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.register_fake("torchtune_fused::attention_backward", lib=LIBRARY)
def _(grad, q, k, v, out, lse, mask, causal, scale, window):
    return _like_bshd(q), _like_bshd(k), _like_bshd(v)


def _like_bshd(x):
    b, h, s, d = x.shape
    return x.new_empty(b, s, h, d).transpose(1, 2)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, mask)


def _autograd(ctx, grad):
    grads = torch.ops.torchtune_fused.attention_backward(
        unit_stride(grad), *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.window
    )
    return *grads, None, None, None, None


register_autograd("attention", _autograd, _setup_context)
