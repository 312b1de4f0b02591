"""Gated MLP: ``(act(x @ w_gateᵀ + b_gate) * (x @ w_upᵀ + b_up)) @ w_downᵀ + b_down``.

Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
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
from torchtune_fused.ops.gated_activation import (
    check_activation,
    gated_activation,
)
from torchtune_fused.ops.gated_linear import gated_linear, gated_linear_backward, linear
from torchtune_fused.ops.grouped_product import rows_of, sum_of_products


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    activation: str = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """Feed-forward block of Llama-type models (SwiGLU with ``activation="silu"``).

    The product of activation and up projection is not kept for the backward pass but computed anew.

    Args:
        x (Tensor): input of shape ``[..., dim]``.
        w_gate (Tensor): weight of shape ``[hidden, dim]``, laid out as in ``nn.Linear``.
        w_up (Tensor): weight of shape ``[hidden, dim]``.
        w_down (Tensor): weight of shape ``[out, hidden]``.
        b_gate (Tensor | None): bias of shape ``[hidden]``.
        b_up (Tensor | None): bias of shape ``[hidden]``.
        b_down (Tensor | None): bias of shape ``[out]``.
        activation (str): ``"silu"``, ``"gelu_tanh"``, ``"gelu"`` or ``"relu"``.
        residual (Tensor | None): what to add to the result, of its shape. On Hopper the last
            product does so on the way, and the result is rounded once.

    Returns:
        Tensor: shape ``[..., out]``, dtype of ``x``.

    Raises:
        TypeError: if a tensor has not the floating-point dtype of ``x``.
        ValueError: if a shape or device doesn't fit, or the activation is unknown.
    """
    check_floating("gated_mlp", "x", x)
    check_activation("gated_mlp", activation)
    op, dim, hidden, out = "gated_mlp", x.shape[-1], w_gate.shape[0], w_down.shape[0]
    check_tensor(op, "w_gate", w_gate, (hidden, dim), "x", x)
    check_tensor(op, "w_up", w_up, (hidden, dim), "x", x)
    check_tensor(op, "w_down", w_down, (out, hidden), "x", x)
    if b_gate is not None:
        check_tensor(op, "b_gate", b_gate, (hidden,), "x", x)
    if b_up is not None:
        check_tensor(op, "b_up", b_up, (hidden,), "x", x)
    if b_down is not None:
        check_tensor(op, "b_down", b_down, (out,), "x", x)
    if residual is not None:
        check_tensor(op, "residual", residual, (*x.shape[:-1], out), "x", x)
    tensors = (x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual)
    # Without a backward pass to come, the op need not write the projections to memory.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return call("gated_mlp", *tensors, activation, save)[0]


def fused_mlp(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """SwiGLU MLP by Llama's names: ``w1`` gates, ``w3`` goes up, ``w2`` down; see `gated_mlp`."""
    return gated_mlp(x, w1, w3, w2)


@define_op(
    "gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? b_gate, Tensor? b_up, "
    "Tensor? b_down, Tensor? residual, str activation, bool save) -> "
    "(Tensor out, Tensor gate, Tensor up)",
    composite=True,
)
def _forward(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, save):
    # gate and up are the projections before the activation; empty unless they are to be saved.
    x = x.contiguous()
    if b_gate is None and b_up is None:
        hidden, gate, up = gated_linear(x, w_gate, w_up, activation, save)
    else:
        gate, up = linear(x, w_gate, b_gate), linear(x, w_up, b_up)
        hidden = gated_activation(gate, up, activation)
        if not save:
            gate, up = x.new_empty(0), x.new_empty(0)
    return linear(hidden, w_down, b_down, residual), gate, up


@torch.library.register_fake("torchtune_fused::gated_mlp", lib=LIBRARY)
def _(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, save):
    hidden = (*x.shape[:-1], w_gate.shape[0]) if save else (0,)
    out = x.new_empty((*x.shape[:-1], w_down.shape[0]))
    return out, x.new_empty(hidden), x.new_empty(hidden)


def _setup_context(ctx, inputs, output):
    x, w_gate, w_up, w_down, *_, ctx.activation, _ = inputs
    _, gate, up = output
    ctx.save_for_backward(x, w_gate, w_up, w_down, gate, up)


def _autograd(ctx, grad):
    x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
    need_x, need_w_gate, need_w_up, need_w_down, *need_bias = ctx.needs_input_grad[:7]
    grad_residual = grad if ctx.needs_input_grad[7] else None
    grad, rows, gate, up = (rows_of(t) for t in (grad, x, gate, up))
    hidden, grad_gate, grad_up = gated_linear_backward(
        grad, w_down, gate, up, ctx.activation, need_hidden=need_w_down
    )
    grad_w_down = grad.t() @ hidden if need_w_down else None
    del hidden  # as large as gate: gone before grad_x comes
    grad_x = None
    if need_x:
        grad_x = sum_of_products((grad_gate, grad_up), (w_gate, w_up)).view(x.shape)
    grad_biases = zip((grad_gate, grad_up, grad), need_bias, strict=True)
    return (
        grad_x,
        grad_gate.t() @ rows if need_w_gate else None,
        grad_up.t() @ rows if need_w_up else None,
        grad_w_down,
        *(g.sum(0) if need else None for g, need in grad_biases),
        grad_residual,
        None,
        None,
    )


register_autograd("gated_mlp", _autograd, _setup_context)
