"""The residual stream and its norm in one pass: ``h = x + residual`` and ``rms_norm(h)``.

Everything a pre-norm layer adds to the stream is followed by the norm of the next branch, and
backward the gradient of that norm by an addition to the stream's own. Each pair is one kernel.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    call,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    define_op,
    refuse_create_graph,
    register_autograd,
)
from torchtune_fused.ops.rms_norm import norm_backward


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, unit_offset=False
) -> tuple[Tensor, Tensor]:
    """Normalises ``x + residual`` as :func:`rms_norm` does, and returns the sum too.

    Whatever gradient reaches the sum by another way than the norm is added in the norm's backward
    pass, in fp32, rather than by autograd. Without ``residual`` that is all there is to gain.

    Args:
        x (Tensor): input of shape ``[..., d]``, any strides.
        residual (Tensor | None): what to add to it, shape and dtype of ``x``. None: nothing.
        weight (Tensor): scale of shape ``[d]``, of any floating dtype.
        eps (float): added to the mean square.
        unit_offset (bool): whether the scale is ``1 + weight`` (Gemma) instead of ``weight``.

    Returns:
        tuple[Tensor, Tensor]: the normalised sum and the sum, shape and dtype of ``x``. The sum is
        rounded before it is normalised, as if it were added by itself; without ``residual`` it is
        ``x``.

    Raises:
        TypeError: if a tensor is not of a floating-point dtype, or ``residual`` not of that of
            ``x``.
        ValueError: if a shape or device doesn't fit.
    """
    op = "add_rms_norm"
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    check_shape(op, "weight", weight, x.shape[-1:])
    check_device(op, "weight", weight, "x", x)
    if residual is None:
        if not torch.is_grad_enabled():
            return call("rms_norm", x, weight, eps, unit_offset)[0], x
        return _NormOfStream.apply(x, weight, eps, unit_offset)[:2]
    check_tensor(op, "residual", residual, x.shape, "x", x)
    return call("add_rms_norm", x, residual, weight, eps, unit_offset)[:2]


# rstd as in rms_norm.
@define_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool unit_offset) -> "
    "(Tensor y, Tensor sum, Tensor rstd)"
)
def _forward(x, residual, weight, eps, unit_offset):
    total = (x + residual).contiguous()
    y, rstd = call("rms_norm", total, weight, eps, unit_offset)
    return y, total, rstd


@torch.library.register_fake("torchtune_fused::add_rms_norm", lib=LIBRARY)
def _(x, residual, weight, eps, unit_offset):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=dtype)


def _setup_context(ctx, inputs, output):
    _, _, weight, _, ctx.unit_offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _autograd(ctx, grad, grad_sum):
    grad_x, grad_weight = norm_backward(ctx, grad, grad_sum, ctx.needs_input_grad[2])
    return grad_x, grad_x, grad_weight, None, None


register_autograd("add_rms_norm", _autograd, _setup_context, differentiable=2)


class _NormOfStream(torch.autograd.Function):
    """The norm of ``x``, and ``x``: so that both gradients of ``x`` come to one place.

    Not an op of its own, since an op of torch.library must not return its input.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, unit_offset):
        y, rstd = call("rms_norm", x, weight, eps, unit_offset)
        ctx.unit_offset = unit_offset
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(x, weight, rstd)
        return y, x.view_as(x), rstd

    @staticmethod
    def backward(ctx, grad, grad_skip, _):
        if grad is None:
            return grad_skip, None, None, None
        refuse_create_graph("add_rms_norm without residual")
        return *norm_backward(ctx, grad, grad_skip, ctx.needs_input_grad[1]), None, None
