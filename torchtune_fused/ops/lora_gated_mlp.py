"""Gated MLP whose three projections carry low-rank adapters; see `gated_mlp` and `lora_linear`."""

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
from torchtune_fused.ops.gated_activation import check_activation, gated_activation
from torchtune_fused.ops.gated_linear import gated_linear, gated_linear_backward
from torchtune_fused.ops.grouped_product import grouped_linear, rows_of, sum_of_products


def lora_gated_mlp(
    x: Tensor,
    gate: AdaptedLinear,
    up: AdaptedLinear,
    down: AdaptedLinear,
    *,
    scale: float,
    activation: str = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """``down(activation(gate(x)) * up(x))``, where each of the three carries an adapter.

    Gate and up share each pass over ``x``. Kept for the backward pass are ``x``, the two
    projections and what is as narrow as the adapters; the product of the two is computed anew.

    Args:
        x (Tensor): input of shape ``[..., dim]``.
        gate (AdaptedLinear): from ``dim`` to ``hidden``.
        up (AdaptedLinear): from ``dim`` to ``hidden``.
        down (AdaptedLinear): from ``hidden`` to ``out``.
        scale (float): factor of all three adapters, ``alpha / rank`` in the paper.
        activation (str): ``"silu"``, ``"gelu_tanh"``, ``"gelu"`` or ``"relu"``.
        residual (Tensor | None): what to add to the result, as in `gated_mlp`.

    Returns:
        Tensor: shape ``[..., out]``, dtype of ``x``.

    Raises:
        TypeError: if a tensor has not the floating-point dtype of ``x``.
        ValueError: if a shape or device doesn't fit, or the activation is unknown.
    """
    op = "lora_gated_mlp"
    check_floating(op, "x", x)
    check_activation(op, activation)
    dim, hidden, out = x.shape[-1], gate.weight.shape[0], down.weight.shape[0]
    for suffix, layer, shape in (
        ("_gate", gate, (hidden, dim)),
        ("_up", up, (hidden, dim)),
        ("_down", down, (out, hidden)),
    ):
        check_adapted(op, suffix, x, shape, layer)
        if layer.a is None:
            raise ValueError(f"{op}: a{suffix} is missing; without adapters, use gated_mlp")
    if residual is not None:
        check_tensor(op, "residual", residual, (*x.shape[:-1], out), "x", x)
    layers = (gate, up, down)
    return call(
        op,
        x,
        *(layer.weight for layer in layers),
        *(layer.bias for layer in layers),
        *(matrix for layer in layers for matrix in (layer.a, layer.b)),
        residual,
        scale,
        activation,
    )[0]


# gate and up are the projections before the activation; low_in, [..., ranks of gate and up], and
# low_down, [..., rank of down], are the inputs of the adapters' second matrices.
@define_op(
    "lora_gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor? bias_gate, "
    "Tensor? bias_up, Tensor? bias_down, Tensor a_gate, Tensor b_gate, Tensor a_up, Tensor b_up, "
    "Tensor a_down, Tensor b_down, Tensor? residual, float scale, str activation) -> "
    "(Tensor out, Tensor gate, Tensor up, Tensor low_in, Tensor low_down)",
    composite=True,
)
def _forward(
    x,
    w_gate,
    w_up,
    w_down,
    bias_gate,
    bias_up,
    bias_down,
    a_gate,
    b_gate,
    a_up,
    b_up,
    a_down,
    b_down,
    residual,
    scale,
    activation,
):
    x = x.contiguous()
    low_in = low_rank([x, x], [a_gate, a_up], scale)
    if bias_gate is None and bias_up is None:
        hidden, gate, up = gated_linear(x, w_gate, w_up, activation, True, low_in, b_gate, b_up)
    else:
        lows = low_in.split([a_gate.shape[0], a_up.shape[0]], dim=-1)
        gate, up = grouped_linear(x, (w_gate, w_up), (bias_gate, bias_up), lows, (b_gate, b_up))
        hidden = gated_activation(gate, up, activation)
    low_down = low_rank([hidden], [a_down], scale)
    (out,) = grouped_linear(hidden, [w_down], [bias_down], [low_down], [b_down], residual)
    return out, gate, up, low_in, low_down


@torch.library.register_fake("torchtune_fused::lora_gated_mlp", lib=LIBRARY)
def _(
    x, w_gate, w_up, w_down, bias_gate, bias_up, bias_down, a_gate, b_gate, a_up, b_up, a_down, *_
):
    widths = (w_down, w_gate, w_up)
    out, gate, up = (x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in widths)
    low_in = x.new_empty((*x.shape[:-1], a_gate.shape[0] + a_up.shape[0]))
    return out, gate, up, low_in, x.new_empty((*x.shape[:-1], a_down.shape[0]))


def _setup_context(ctx, inputs, output):
    x, w_gate, w_up, w_down, _, _, _, *adapters, _, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(x, w_gate, w_up, w_down, *adapters, *output[1:])


def _autograd(ctx, grad):
    x, w_gate, w_up, w_down, *adapters, gate, up, low_in, low_down = ctx.saved_tensors
    a_gate, b_gate, a_up, b_up, a_down, b_down = adapters
    need_x, need_w_gate, need_w_up, need_w_down, *need_bias = ctx.needs_input_grad[:7]
    need_a_gate, need_b_gate, need_a_up, need_b_up, need_a_down, need_b_down = ctx.needs_input_grad[
        7:13
    ]
    grad_residual = grad if ctx.needs_input_grad[13] else None
    grad, rows, gate, up, low_in, low_down = (
        rows_of(t) for t in (grad, x, gate, up, low_in, low_down)
    )
    rank = a_gate.shape[0]

    grad_low_down, (grad_b_down,) = adapter_backward([grad], [b_down], low_down, ctx.scale)
    need_hidden = need_w_down or need_a_down
    hidden, grad_gate, grad_up = gated_linear_backward(
        grad, w_down, gate, up, ctx.activation, need_hidden, grad_low_down, a_down
    )
    grad_w_down = grad.t() @ hidden if need_w_down else None
    grad_a_down = grad_low_down.t() @ hidden if need_a_down else None
    del hidden  # as large as gate: gone before grad_x comes

    grad_low_in, (grad_b_gate, grad_b_up) = adapter_backward(
        [grad_gate, grad_up], [b_gate, b_up], low_in, ctx.scale
    )
    grad_x = grad_a_in = None
    if need_x:
        matrices = w_gate, w_up, torch.cat((a_gate, a_up))
        grad_x = sum_of_products((grad_gate, grad_up, grad_low_in), matrices).view(x.shape)
    if need_a_gate or need_a_up:
        grad_a_in = grad_low_in.t() @ rows
    grad_biases = zip((grad_gate, grad_up, grad), need_bias, strict=True)
    return (
        grad_x,
        grad_gate.t() @ rows if need_w_gate else None,
        grad_up.t() @ rows if need_w_up else None,
        grad_w_down,
        *(g.sum(0) if need else None for g, need in grad_biases),
        grad_a_in[:rank] if need_a_gate else None,
        grad_b_gate if need_b_gate else None,
        grad_a_in[rank:] if need_a_up else None,
        grad_b_up if need_b_up else None,
        grad_a_down,
        grad_b_down if need_b_down else None,
        grad_residual,
        None,
        None,
    )


register_autograd("lora_gated_mlp", _autograd, _setup_context)
