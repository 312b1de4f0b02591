"""Queries and keys as attention takes them: each head normalised and rotated, in one pass.

The norm is that of Dehghani et al., Scaling Vision Transformers to 22 Billion Parameters,
https://arxiv.org/abs/2302.05442, as an RMSNorm; the rotation is `rope`.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_device,
    check_floating,
    check_like,
    check_shape,
    define_op,
    refuse_create_graph,
    register_autograd,
)
from torchtune_fused.ops.rms_norm import normalise_backward, reciprocal_rms
from torchtune_fused.ops.rope import Rotation, check_angles, rotation


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor | None = None,
    *,
    interleaved: bool,
    head_norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    norm_before_rope: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotates the heads of ``q`` and ``k``, and normalises them where a model does so.

    Everything is computed in fp32 (fp64 for fp64 input) and rounded once at the end.

    Args:
        q (Tensor): queries of shape ``[b, s, h, d]``, any strides.
        k (Tensor): keys of shape ``[b, s, h_kv, d]``, any strides, dtype of ``q``.
        cos (Tensor): cosines of shape ``[max_seq_len, d / 2]``, fp32, any strides.
        sin (Tensor): sines, as ``cos``.
        input_pos (Tensor | None): position of each token, int32 or int64, of any shape that can be
            read as ``[1, s]`` or ``[b, s]``. None means 0, 1, … s - 1.
        interleaved (bool): whether pairs ``(2i, 2i + 1)`` are rotated, or ``(i, i + d / 2)``.
        head_norms (tuple[Tensor, Tensor] | None): scales of shape ``[d]``, of any floating dtype,
            of an RMSNorm over each head of the queries, and of the keys; None: no norm.
        eps (float): epsilon of those norms.
        norm_before_rope (bool): whether heads are normalised before they are rotated (Qwen3), or
            after (torchtune).

    Returns:
        tuple[Tensor, Tensor]: queries and keys, contiguous, shapes and dtype as given.

    Raises:
        TypeError: if a tensor has a dtype of the wrong kind.
        ValueError: if shapes or devices don't fit, or if a position lies beyond ``max_seq_len``
            (positions in ``input_pos`` are checked on the CPU only).
    """
    op = "qk_norm_rope"
    q_norm, k_norm = check_heads(op, q, k, cos, sin, input_pos, head_norms)
    return call(
        op, q, k, q_norm, k_norm, cos, sin, input_pos, eps, interleaved, norm_before_rope, False
    )


def rotate_heads(q: Tensor, k: Tensor, angles: Rotation) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys that are not split into heads, ``[b, s, heads * d]``.

    Args:
        q (Tensor): queries.
        k (Tensor): keys.
        angles (Rotation): of their tokens; ``d`` is twice the number of angles.

    Returns:
        tuple[Tensor, Tensor]: of the same shapes, contiguous.
    """
    split = (t.unflatten(-1, (-1, 2 * angles.cos.shape[1])) for t in (q, k))
    cos, sin, input_pos, interleaved = angles
    options = None, None, cos, sin, input_pos, 0.0, interleaved, False, False
    rotated_q, rotated_k = call("qk_norm_rope", *split, *options)
    return rotated_q.flatten(-2), rotated_k.flatten(-2)


def check_heads(
    op: str,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor | None,
    head_norms: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Raises unless queries and keys fit together, and to angles and norms; gives the norms."""
    check_floating(op, "q", q)
    if q.ndim != 4 or q.shape[3] % 2 != 0 or k.ndim != 4:
        raise ValueError(
            f"{op}: q and k must have shape [b, s, heads, d], d even, got {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    b, s, _, d = q.shape
    check_shape(op, "k", k, (b, s, k.shape[2], d))
    check_like(op, "k", k, "q", q)
    check_angles(op, "q", q, cos, sin, input_pos)
    q_norm, k_norm = head_norms or (None, None)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_floating(op, name, weight)
            check_shape(op, name, weight, (d,))
            check_device(op, name, weight, "q", q)
    return q_norm, k_norm


# inverse rotates the other way, which without norms is the gradient.
@define_op(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_norm, Tensor? k_norm, Tensor cos, Tensor sin, "
    "Tensor? input_pos, float eps, bool interleaved, bool norm_before_rope, bool inverse) -> "
    "(Tensor q_out, Tensor k_out)"
)
def reference(
    q, k, q_norm, k_norm, cos, sin, input_pos, eps, interleaved, norm_before_rope, inverse
):
    rotate = rotation("qk_norm_rope", q, cos, sin, input_pos, interleaved, inverse)

    def heads(x, weight):
        wide = at_least_fp32(x)
        if weight is not None and norm_before_rope:
            wide = (wide * reciprocal_rms(wide, eps)).mul_(weight)
        wide = rotate(wide)
        if weight is not None and not norm_before_rope:
            wide = (wide * reciprocal_rms(wide, eps)).mul_(weight)
        return wide.type_as(x)

    return heads(q, q_norm), heads(k, k_norm)


@define_op(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor q_norm, "
    "Tensor k_norm, Tensor cos, Tensor sin, Tensor? input_pos, float eps, bool interleaved, "
    "bool norm_before_rope) -> "
    "(Tensor grad_q_in, Tensor grad_k_in, Tensor grad_q_norm, Tensor grad_k_norm)"
)
def _backward(
    grad_q,
    grad_k,
    q,
    k,
    q_norm,
    k_norm,
    cos,
    sin,
    input_pos,
    eps,
    interleaved,
    norm_before_rope,
):
    angles = ("qk_norm_rope", q, cos, sin, input_pos, interleaved)
    rotate, rotate_back = rotation(*angles, False), rotation(*angles, True)

    def heads(grad, x, weight):
        grad, wide = at_least_fp32(grad.contiguous()), at_least_fp32(x.contiguous())
        if norm_before_rope:
            grad = rotate_back(grad)
        else:
            wide = rotate(wide)
        rstd = reciprocal_rms(wide, eps)
        grad, grad_weight = normalise_backward(grad, wide, weight, rstd)
        if not norm_before_rope:
            grad = rotate_back(grad)
        return grad.to(x.dtype), grad_weight.to(weight.dtype)

    (grad_q, grad_q_norm), (grad_k, grad_k_norm) = (
        heads(grad_q, q, q_norm),
        heads(grad_k, k, k_norm),
    )
    return grad_q, grad_k, grad_q_norm, grad_k_norm


@torch.library.register_fake("torchtune_fused::qk_norm_rope", lib=LIBRARY)
def _(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.register_fake("torchtune_fused::qk_norm_rope_backward", lib=LIBRARY)
def _(grad_q, grad_k, q, k, q_norm, k_norm, *_):
    return tuple(t.new_empty(t.shape) for t in (q, k, q_norm, k_norm))


def _setup_context(ctx, inputs, output):
    q, k, q_norm, k_norm, cos, sin, input_pos, *ctx.flags, ctx.inverse = inputs
    heads = (None,) * 4 if q_norm is None else (q, k, q_norm, k_norm)
    ctx.save_for_backward(*heads, cos, sin, input_pos)


def _autograd(ctx, grad_q, grad_k):
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them at each access
    heads, angles = saved[:4], saved[4:]
    if heads[0] is None:
        # A rotation is orthogonal: its transpose is the rotation by the opposite angle.
        grads = call(
            "qk_norm_rope", grad_q, grad_k, None, None, *angles, *ctx.flags, not ctx.inverse
        )
        return *grads, *(None,) * 9
    refuse_create_graph("qk_norm_rope with norms")
    grads = call("qk_norm_rope_backward", grad_q, grad_k, *heads, *angles, *ctx.flags)
    return *grads, *(None,) * 7


register_autograd("qk_norm_rope", _autograd, _setup_context, differentiable=2, twice=True)
