"""RMSNorm: ``y = x / sqrt(mean(x²) + eps) * weight``, or ``* (1 + weight)``, computed in fp32.

Zhang and Sennrich, Root Mean Square Layer Normalization, https://arxiv.org/abs/1910.07467.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_device,
    check_floating,
    check_shape,
    define_op,
    register_autograd,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, unit_offset: bool = False) -> Tensor:
    """Normalises the last dimension of ``x`` by its root mean square and scales it.

    Statistics and products are fp32 (fp64 for fp64 input), rounded once at the end, as torchtune's
    RMSNorm does.

    Args:
        x (Tensor): input of shape ``[..., d]``, any strides.
        weight (Tensor): scale of shape ``[d]``, of any floating dtype.
        eps (float): added to the mean square.
        unit_offset (bool): whether the scale is ``1 + weight`` (Gemma) instead of ``weight``.

    Returns:
        Tensor: contiguous, shape and dtype of ``x``.

    Raises:
        TypeError: if ``x`` or ``weight`` is not of a floating-point dtype.
        ValueError: if ``weight`` has not the shape ``[d]`` or is on another device.
    """
    check_floating("rms_norm", "x", x)
    check_floating("rms_norm", "weight", weight)
    check_shape("rms_norm", "weight", weight, x.shape[-1:])
    check_device("rms_norm", "weight", weight, "x", x)
    return call("rms_norm", x, weight, eps, unit_offset)[0]


def _cpu(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    if x.numel() == x.shape[-1] and not unit_offset:
        # One token: ATen takes as many passes over it as temporaries, but a single call.
        y, rstd = torch._fused_rms_norm(x, weight.shape, weight, eps)
        return y, rstd.squeeze(-1)
    return _forward(x, weight, eps, unit_offset)


# rstd, [...] in fp32, is the reciprocal of the root mean square of each row.
@define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, bool unit_offset) -> (Tensor y, Tensor rstd)",
    cpu=_cpu,
)
def _forward(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> tuple[Tensor, Tensor]:
    wide = at_least_fp32(x.contiguous())
    rstd = reciprocal_rms(wide, eps)
    y = (wide * rstd).mul_(_scale(weight, unit_offset)).to(x.dtype)
    return y, rstd.squeeze_(-1)


# grad_skip is the gradient of x past the norm, to be added; grad_weight is empty if not needed.
@define_op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_skip, "
    "bool unit_offset, bool need_weight) -> (Tensor grad_x, Tensor grad_weight)"
)
def _backward(grad, x, weight, rstd, grad_skip, unit_offset, need_weight):
    grad, x_wide = at_least_fp32(grad.contiguous()), at_least_fp32(x.contiguous())
    scale = _scale(weight, unit_offset)
    grad_x, grad_weight = normalise_backward(grad, x_wide, scale, rstd.unsqueeze(-1))
    if grad_skip is not None:
        grad_x += grad_skip
    grad_weight = grad_weight.to(weight.dtype) if need_weight else weight.new_empty(0)
    return grad_x.to(x.dtype), grad_weight


def _scale(weight: Tensor, unit_offset: bool) -> Tensor:
    return at_least_fp32(weight) + 1 if unit_offset else weight


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x²) + eps)`` of each row, its dimension kept."""
    # The norm reads x once and keeps nothing of its size, where x.square().mean() would.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalise_backward(
    grad: Tensor, x: Tensor, scale: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``scale``, in the precision of ``x``; all are contiguous."""
    # With n = x * rstd: dx = rstd * (g * w - n * mean(g * w * n)), dw = sum over rows of g * n.
    normed = x * rstd
    product = grad * normed
    grad_scale = product.view(-1, x.shape[-1]).sum(0)
    mean = (product @ scale.to(product.dtype)).unsqueeze(-1).div_(x.shape[-1])
    grad_x = torch.mul(grad, scale, out=product).addcmul_(normed, mean, value=-1).mul_(rstd)
    return grad_x, grad_scale


@torch.library.register_fake("torchtune_fused::rms_norm", lib=LIBRARY)
def _(x, weight, eps, unit_offset):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=dtype)


@torch.library.register_fake("torchtune_fused::rms_norm_backward", lib=LIBRARY)
def _(grad, x, weight, rstd, grad_skip, unit_offset, need_weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx, inputs, output):
    x, weight, _, ctx.unit_offset = inputs
    ctx.save_for_backward(x, weight, output[1])


def norm_backward(
    ctx, grad: Tensor, grad_skip: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and weight, for a context that has saved x, weight and rstd."""
    grad_x, grad_weight = call(
        "rms_norm_backward", grad, *ctx.saved_tensors, grad_skip, ctx.unit_offset, need_weight
    )
    return grad_x, grad_weight if need_weight else None


def _autograd(ctx, grad):
    return *norm_backward(ctx, grad, None, ctx.needs_input_grad[1]), None, None


register_autograd("rms_norm", _autograd, _setup_context)
