"""Linear layer with a low-rank adapter: ``x @ weightᵀ + bias + scale * (x @ aᵀ) @ bᵀ``.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    call,
    check_floating,
    check_tensor,
    define_op,
    register_autograd,
)
from torchtune_fused.ops.adapters import (
    AdaptedLinear,
    adapter_backward,
    check_adapted,
    low_rank,
)
from torchtune_fused.ops.grouped_product import grouped_linear, rows_of, sum_of_products


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
    shape = weight.shape[0], x.shape[-1]
    check_adapted(op, "", x, shape, AdaptedLinear(weight, a, b, bias))
    if adapter_input is not None:
        check_tensor(op, "adapter_input", adapter_input, x.shape, "x", x)
    return call(op, x, adapter_input, weight, bias, a, b, scale)[0]


# low, [..., rank], is scale * adapter_input @ aᵀ: what the gradient of b needs.
@define_op(
    "lora_linear(Tensor x, Tensor? adapter_input, Tensor weight, Tensor? bias, Tensor a, Tensor b, "
    "float scale) -> (Tensor out, Tensor low)",
    composite=True,
)
def _forward(x, adapter_input, weight, bias, a, b, scale):
    low = low_rank([x if adapter_input is None else adapter_input], [a], scale)
    return grouped_linear(x.contiguous(), [weight], [bias], [low], [b])[0], low


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
    grad = rows_of(grad)
    rows = None if x is None else rows_of(x)
    seen = rows if adapter_input is None else rows_of(adapter_input)

    grad_low, (grad_b,) = adapter_backward([grad], [b], rows_of(low), ctx.scale)
    grad_x = None
    if need_x:
        both = adapter_input is None
        grads, matrices = ([grad, grad_low], [weight, a]) if both else ([grad], [weight])
        grad_x = sum_of_products(grads, matrices).view(ctx.shape)
    return (
        grad_x,
        (grad_low @ a).view(ctx.shape) if need_input else None,
        grad.t() @ rows if need_weight else None,
        grad.sum(0) if need_bias else None,
        grad_low.t() @ seen if need_a else None,
        grad_b if need_b else None,
        None,
    )


register_autograd("lora_linear", _autograd, _setup_context)
