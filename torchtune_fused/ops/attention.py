"""Exact attention with grouped heads, any boolean mask and a sliding window; differentiable.

Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135; Ainslie et al., GQA,
https://arxiv.org/abs/2305.13245; softcap: Gemma 2, https://arxiv.org/abs/2408.00118. On the CPU the
work is done by ATen's flash attention; on CUDA by the kernels and, for what they don't take, by
PyTorch (attention_pytorch.py).
"""

import torch
from torch import Tensor

from torchtune_fused.build import load_kernels
from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_floating,
    check_softcap,
    check_tensor,
    define_op,
    register_autograd,
    unit_stride,
)
from torchtune_fused.ops.attention_mask import (
    MaskTiles,
    check_documents,
    check_mask,
    check_window,
    dense_mask,
    mask_tiles,
    visible,
)
from torchtune_fused.ops.attention_pytorch import (
    cudnn_backward,
    cudnn_is_faster,
    pytorch_attention,
)
from torchtune_fused.ops.rope import NO_ROTATION, Rotation

# Below this, scores lie so close to the cap that its slope can't be told from bf16 probabilities,
# which is all that the backward kernels keep.
_LEAST_SOFTCAP = 1.0

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | MaskTiles | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    documents: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax attention of queries over keys and values.

    Key j is visible to query i if ``mask`` says so, and, with ``causal``, ``j <= i``, and, with
    ``window``, ``i - j < window``, where the last query stands at the last key, and, with
    ``documents``, if both are of the same document. A query that sees no key gets zeros, and passes
    zero gradients.

    Under ``torch.use_deterministic_algorithms`` the gradients are the same bits in every run.

    Args:
        q (Tensor): queries of shape ``[b, h, s, d]``, any strides.
        k (Tensor): keys of shape ``[b, h_kv, s_kv, d]``, where ``h_kv`` divides ``h``: query head i
            reads key head ``i // (h / h_kv)``.
        v (Tensor): values, as ``k``.
        mask (Tensor | MaskTiles | None): bool of shape ``[b or 1, s, s_kv]`` or
            ``[b or 1, h or 1, s, s_kv]``; True lets a query attend to a key. Or what `mask_tiles`
            made of one, which saves doing so at every call.
        causal (bool): whether keys after a query are hidden from it. Needs ``s == s_kv``.
        scale (float | None): factor of the scores. Default: ``d ** -0.5``.
        window (int | None): how many keys a query sees at most, counting back from its own.
        documents (Tensor | None): int32 of shape ``[2, b, s]``, from `document_bounds`. Needs
            ``s == s_kv``.
        softcap (float | None): bounds the scores to ``softcap * tanh(score / softcap)``, before
            anything is hidden.

    Returns:
        Tensor: shape ``[b, h, s, d]``, in memory ``[b, s, h, d]``, dtype of ``q``.

    Raises:
        TypeError: if dtypes differ, ``mask`` is not bool or ``documents`` not int32.
        ValueError: if shapes or devices don't fit, ``window < 1`` or ``softcap <= 0``.
    """
    check_qkv("attention", q, k, v)
    s, s_kv = q.shape[2], k.shape[2]
    if s != s_kv and (causal or documents is not None):
        needing = "causal needs" if causal else "documents need"
        raise ValueError(f"attention: {needing} as many queries as keys, got {s} and {s_kv}")
    check_softcap("attention", softcap)
    check_documents("attention", documents, q)
    mask, kinds = check_mask("attention", mask, q, s_kv)
    window = check_window("attention", window, s_kv)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda:
        if not has_kernel(q, q.shape[-1]) or (softcap is not None and softcap < _LEAST_SOFTCAP):
            mask = dense_mask(mask, kinds, s_kv)
            if mask is not None or documents is not None or window is not None:
                mask, causal = visible(s, s_kv, mask, causal, window, documents, q.device), False
            return as_bshd(pytorch_attention(q, k, v, mask, causal, scale, softcap))
        if mask is not None and kinds is None:
            kinds, mask = mask_tiles(mask)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    return call("attention", q, k, v, mask, kinds, documents, causal, scale, window, softcap)[0]


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


@torch.compiler.assume_constant_result
def _kernels_are_loaded() -> bool:
    return load_kernels()


def has_kernel(like: Tensor, head_dim: int) -> bool:
    """Whether the kernels take queries of this head dimension, on the device and of the dtype."""
    return (
        like.is_cuda
        and like.dtype in (torch.float16, torch.bfloat16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and _kernels_are_loaded()
    )


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the term that ATen adds to the scores: 0 where it is True, else -inf."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def as_bshd(x: Tensor) -> Tensor:
    """``[b, h, s, d]`` laid out in memory as ``[b, s, h, d]``: merging heads needs no copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cpu_flash(q, k, v, mask, causal, scale, window, documents=None):
    """Attention by ATen's flash attention for the CPU, which reads grouped heads in place."""
    bias, causal = _cpu_mask(q, k, mask, causal, window, documents)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return as_bshd(out), lse.contiguous()


def _cpu(q, k, v, mask, kinds, documents, causal, scale, window, softcap):
    if softcap is not None:
        return closed_form(q, k, v, mask, kinds, documents, causal, scale, window, softcap)
    mask = dense_mask(mask, kinds, k.shape[2])
    return cpu_flash(q, k, v, mask, causal, scale, window, documents)


def _cpu_backward(
    grad, q, k, v, out, lse, mask, kinds, documents, causal, scale, window, softcap, *others
):
    tensors, hidden = (grad, q, k, v, out, lse), (mask, kinds, documents)
    if softcap is not None:
        return closed_form_backward(*tensors, *hidden, causal, scale, window, softcap, *others)
    _, *rotation = others
    bias, causal = _cpu_mask(q, k, dense_mask(mask, kinds, k.shape[2]), causal, window, documents)
    grad_q, grad_k, grad_v = _flash_backward(*tensors, 0.0, causal, attn_mask=bias, scale=scale)
    grads = _turned_back(grad_q, *rotation), _turned_back(grad_k, *rotation), grad_v
    return tuple(as_bshd(t) for t in grads)


def _cpu_mask(q, k, mask, causal, window, documents):
    """What ATen takes: a term to add to the scores, or its own causal mask, which skips work."""
    s, s_kv = q.shape[2], k.shape[2]
    if causal and mask is None and window is None and documents is None and s == s_kv:
        return None, True
    seen = visible(s, s_kv, mask, causal, window, documents, q.device)
    return (None if seen is None else additive(seen, q.dtype)), False


# mask is bool, or the bits of a MaskTiles, whose kinds then come along. lse is in fp32 the natural
# log(sum(exp(scores))) of the scores as softcap leaves them; 0 where no key is seen.
@define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? mask_kinds, Tensor? documents, "
    "bool causal, float scale, int? window, float? softcap) -> (Tensor out, Tensor lse)",
    cpu=_cpu,
)
def closed_form(q, k, v, mask, kinds, documents, causal, scale, window, softcap):
    """Attention by its definition, with the scores in memory; the reference of every device."""
    b, h, s, d = q.shape
    scores = _scores(q, k, scale, softcap)
    _hide(scores, mask, kinds, documents, causal, window)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill_(lse == -torch.inf, 0.0)
    out = (scores - lse.unsqueeze(-1)).exp_() @ at_least_fp32(v).unsqueeze(2)
    return as_bshd(out.view(b, h, s, d).to(q.dtype)), lse.view(b, h, s)


# Where cos is given, q and k are rotations by `rope`, and the gradients are those of what they were
# before; the same bits in every run if deterministic.
@define_op(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? mask, Tensor? mask_kinds, Tensor? documents, bool causal, float scale, int? window, "
    "float? softcap, bool deterministic, Tensor? cos, Tensor? sin, Tensor? input_pos, "
    "bool interleaved) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    cpu=_cpu_backward,
)
def closed_form_backward(
    grad, q, k, v, out, lse, mask, kinds, documents, causal, scale, window, softcap, _, *rotation
):
    """Gradients of attention from its output and log-sum-exp; the reference of every device."""
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    scores = _scores(q, k, scale, softcap)
    slope = scale if softcap is None else scale * (1 - (scores / softcap).square())
    _hide(scores, mask, kinds, documents, causal, window)
    probs = scores.sub_(lse.unflatten(1, groups).unsqueeze(-1)).exp_()
    grad, out, q_ = (at_least_fp32(t).unflatten(1, groups) for t in (grad, out, q))
    k_, v_ = at_least_fp32(k).unsqueeze(2), at_least_fp32(v).unsqueeze(2)
    grad_v = (probs.mT @ grad).sum(2)
    grad_scores = (grad @ v_.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(probs).mul_(slope)
    grad_q = _turned_back((grad_scores @ k_).flatten(1, 2), *rotation)
    grad_k = _turned_back((grad_scores.mT @ q_).sum(2), *rotation)
    return tuple(as_bshd(t.to(q.dtype)) for t in (grad_q, grad_k, grad_v))


def _scores(q, k, scale, softcap):
    # [b, h_kv, h / h_kv, s, s_kv]: the heads of a group meet their key head without expanding it.
    h, h_kv = q.shape[1], k.shape[1]
    grouped = at_least_fp32(q).unflatten(1, (h_kv, h // h_kv))
    scores = (grouped @ at_least_fp32(k).unsqueeze(2).mT).mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hide(scores, mask, kinds, documents, causal, window):
    b, h_kv, groups, s, s_kv = scores.shape
    mask = dense_mask(mask, kinds, s_kv)
    seen = visible(s, s_kv, mask, causal, window, documents, scores.device)
    if seen is not None:
        scores.view(b, h_kv * groups, s, s_kv).masked_fill_(~seen, -torch.inf)


def _turned_back(grad, cos, sin, input_pos, interleaved):
    """The gradient of what was rotated, from that of its rotation: ``[b, h, s, d]``."""
    if cos is None:
        return grad
    turned = call("rope", grad.transpose(1, 2), cos, sin, input_pos, interleaved, True)
    return turned.transpose(1, 2)


@torch.library.register_fake("torchtune_fused::attention", lib=LIBRARY)
def _(q, k, v, mask, kinds, documents, causal, scale, window, softcap):
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _like_bshd(q), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.register_fake("torchtune_fused::attention_backward", lib=LIBRARY)
def _(grad, q, k, v, *_):
    return _like_bshd(q), _like_bshd(k), _like_bshd(v)


def _like_bshd(x):
    b, h, s, d = x.shape
    return x.new_empty(b, s, h, d).transpose(1, 2)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.causal, ctx.scale, ctx.window, ctx.softcap = inputs
    q, k, v, mask, kinds, documents = tensors
    ctx.save_for_backward(q, k, v, *output, mask, kinds, documents)


def _autograd(ctx, grad):
    *tensors, mask, kinds, documents = ctx.saved_tensors
    options = mask, kinds, documents, ctx.causal, ctx.scale, ctx.window, ctx.softcap
    return *attention_gradients(grad, tensors, options), *[None] * 7


def attention_gradients(grad, tensors, options, rotation: Rotation = NO_ROTATION):
    """The gradients of q, k and v, or of what q and k were before a rotation.

    ``tensors`` are q, k, v and what the op gave, ``options`` its other arguments.
    """
    (q, k, v, out, lse), (*hidden, causal, scale, window, softcap) = tensors, options
    deterministic = torch.are_deterministic_algorithms_enabled()
    if q.is_cuda:
        others = any(t is not None for t in (*hidden, window, softcap))
        if cudnn_is_faster(q, k, v, causal, others, deterministic):
            grads = cudnn_backward(as_bshd(grad), q, k, v, out, lse, causal, scale)
            return *(_turned_back(t, *rotation) for t in grads[:2]), grads[2]
    return call(
        "attention_backward", unit_stride(grad), *tensors, *options, deterministic, *rotation
    )


register_autograd("attention", _autograd, _setup_context)
