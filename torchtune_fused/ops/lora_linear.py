"""Linear layer with a low-rank adapter: ``x @ weightᵀ + bias + scale * (x @ aᵀ) @ bᵀ``.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    call,
    check_floating,
    check_tensor,
    define_op,
    register_autograd,
)
from torchtune_fused.ops.gated_linear import add_product


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float,
    adapter_input: Tensor | None = None,
) -> Tensor:
    """Applies a linear layer and its adapter; the adapter's product is summed into the layer's.

    Args:
        x (Tensor): input of shape ``[..., in]``.
        weight (Tensor): weight of shape ``[out, in]``, as in ``nn.Linear``; usually frozen.
        a (Tensor): the adapter's first matrix, ``[rank, in]``.
        b (Tensor): its second, ``[out, rank]``.
        bias (Tensor | None): bias of shape ``[out]``.
        scale (float): factor of the adapter, ``alpha / rank`` in the paper.
        adapter_input (Tensor | None): what the adapter sees in place of ``x``, of the same shape:
            ``dropout(x)`` in training with dropout. Default: ``x``.

    Returns:
        Tensor: shape ``[..., out]``, dtype of ``x``.

    Raises:
        TypeError: if a tensor has not the floating-point dtype of ``x``.
        ValueError: if a shape or device doesn't fit.
    """
    op = "lora_linear"
    check_floating(op, "x", x)
    check_adapted(op, "", x, (weight.shape[0], x.shape[-1]), weight, bias, a, b)
    if adapter_input is not None:
        check_tensor(op, "adapter_input", adapter_input, x.shape, "x", x)
    return call(op, x, adapter_input, weight, bias, a, b, scale)[0]


def check_adapted(
    op: str,
    suffix: str,
    x: Tensor,
    shape: tuple[int, int],
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
) -> None:
    """Raises unless weight, bias and adapter fit a layer with a weight of ``shape``."""
    rank, (n, k) = a.shape[0], shape
    check_tensor(op, f"weight{suffix}", weight, (n, k), "x", x)
    check_tensor(op, f"a{suffix}", a, (rank, k), "x", x)
    check_tensor(op, f"b{suffix}", b, (n, rank), "x", x)
    if bias is not None:
        check_tensor(op, f"bias{suffix}", bias, (n,), "x", x)


# low, [..., rank], is scale * adapter_input @ aᵀ: what the gradient of b needs.
@define_op(
    "lora_linear(Tensor x, Tensor? adapter_input, Tensor weight, Tensor? bias, Tensor a, Tensor b, "
    "float scale) -> (Tensor out, Tensor low)"
)
def _forward(x, adapter_input, weight, bias, a, b, scale):
    low = F.linear(x if adapter_input is None else adapter_input, a).mul_(scale)
    return add_product(F.linear(x.contiguous(), weight, bias), low, b), low


@torch.library.register_fake("torchtune_fused::lora_linear", lib=LIBRARY)
def _(x, adapter_input, weight, bias, a, b, scale):
    rows = x.shape[:-1]
    return x.new_empty((*rows, weight.shape[0])), x.new_empty((*rows, a.shape[0]))


def _setup_context(ctx, inputs, output):
    x, adapter_input, weight, _, a, b, ctx.scale = inputs
    # With dropout, x itself serves only the gradient of a weight that is usually frozen.
    kept_x = x if adapter_input is None or ctx.needs_input_grad[2] else None
    ctx.save_for_backward(kept_x, adapter_input, weight, a, b, output[1])
    ctx.shape = x.shape


def _autograd(ctx, grad):
    x, adapter_input, weight, a, b, low = ctx.saved_tensors
    need_x, need_input, need_weight, need_bias, need_a, need_b, _ = ctx.needs_input_grad
    grad, low = (t.reshape(-1, t.shape[-1]) for t in (grad, low))
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    seen = rows if adapter_input is None else adapter_input.reshape(-1, adapter_input.shape[-1])

    grad_low = (grad @ b).mul_(ctx.scale)
    grad_x = grad @ weight if need_x else None
    if need_x and adapter_input is None:
        grad_x.addmm_(grad_low, a)
    return (
        None if grad_x is None else grad_x.view(ctx.shape),
        (grad_low @ a).view(ctx.shape) if need_input else None,
        grad.t() @ rows if need_weight else None,
        grad.sum(0) if need_bias else None,
        grad_low.t() @ seen if need_a else None,
        grad.t() @ low if need_b else None,
        None,
    )


register_autograd("lora_linear", _autograd, _setup_context)
