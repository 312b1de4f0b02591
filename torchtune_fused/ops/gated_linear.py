"""``activation(x @ w_gateᵀ) * (x @ w_upᵀ)``, the first half of a gated MLP, with or without LoRA.

Not public: what `gated_mlp` and `lora_gated_mlp` are made of. One kernel forward and one backward,
where there is one; elsewhere matrix products around `gated_activation`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op
from torchtune_fused.ops.gated_activation import gated_activation, gated_activation_backward
from torchtune_fused.ops.grouped_product import grouped_linear


def gated_linear(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    activation: str,
    save: bool,
    low: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The activation of one projection times another: in one kernel, where there is one.

    Args:
        x (Tensor): input of shape ``[..., k]``, contiguous.
        w_gate (Tensor): weight of the projection that is activated, ``[n, k]``.
        w_up (Tensor): weight of the other, ``[n, k]``.
        activation (str): its name.
        save (bool): whether the projections themselves are wanted too.
        low (Tensor | None): inputs of both adapters side by side, ``[..., ranks]``, contiguous.
        b_gate (Tensor | None): ``[n, rank]``; ``low @ b_gateᵀ``, of the first columns of low, is
            added to the projection that is activated.
        b_up (Tensor | None): the same of the other columns for the other.

    Returns:
        tuple[Tensor, Tensor, Tensor]: the product and the two projections, ``[..., n]``; without
        ``save``, the latter are empty.
    """
    if x.is_cuda:
        ops = torch.ops.torchtune_fused
        if ops.gated_linear_takes(x, w_gate, w_up, [] if low is None else [low, b_gate, b_up]):
            return ops.gated_linear(x, w_gate, w_up, low, b_gate, b_up, activation, save)
    return _reference(x, w_gate, w_up, low, b_gate, b_up, activation, save)


def gated_linear_backward(
    grad: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    need_hidden: bool,
    grad_low: Tensor | None = None,
    a_down: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the projections from that of the whole MLP, and their product once more.

    Args:
        grad (Tensor): gradient of what the MLP returns, ``[rows, out]``.
        w_down (Tensor): its last weight, ``[out, n]``.
        gate (Tensor): the projections as in the forward pass, ``[rows, n]``.
        up (Tensor): likewise.
        activation (str): its name.
        need_hidden (bool): whether the product is wanted; it is empty otherwise.
        grad_low (Tensor | None): of the last adapter, ``[rows, rank]``.
        a_down (Tensor | None): ``[rank, n]``; ``grad_low @ a_down`` is added to ``grad @ w_down``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: the product, the gradient of gate and that of up.
    """
    return call(
        "gated_mlp_hidden_backward",
        grad,
        w_down,
        gate,
        up,
        grad_low,
        a_down,
        activation,
        need_hidden,
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, addend: Tensor | None = None
) -> Tensor:
    """``F.linear``, plus ``addend``; with a faster way for one token in bf16 on a CPU."""
    if addend is not None:
        return grouped_linear(x, [weight], [bias], [None], [None], addend)[0]
    if x.is_cpu and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:
        # The product with a vector is 1.4 times as fast as that of bf16 matrices.
        vector = x.view(-1)
        out = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


@define_op(
    "gated_linear(Tensor x, Tensor w_gate, Tensor w_up, Tensor? low, Tensor? b_gate, "
    "Tensor? b_up, str activation, bool save) -> (Tensor hidden, Tensor gate, Tensor up)"
)
def _reference(x, w_gate, w_up, low, b_gate, b_up, activation, save):
    if low is None:
        gate, up = linear(x, w_gate), linear(x, w_up)
    else:
        bs = b_gate, b_up
        lows = low.split([b.shape[1] for b in bs], dim=-1)
        gate, up = grouped_linear(x, (w_gate, w_up), (None, None), lows, bs)
    hidden = gated_activation(gate, up, activation)
    return (hidden, gate, up) if save else (hidden, x.new_empty(0), x.new_empty(0))


@define_op(
    "gated_linear_backward(Tensor grad, Tensor w_down, Tensor gate, Tensor up, Tensor? grad_low, "
    "Tensor? a_down, str activation, bool need_hidden) -> "
    "(Tensor hidden, Tensor grad_gate, Tensor grad_up)"
)
def _backward_reference(grad, w_down, gate, up, grad_low, a_down, activation, need_hidden):
    grad_hidden = grad @ w_down
    if grad_low is not None:
        grad_hidden.addmm_(grad_low, a_down)
    return gated_activation_backward(grad_hidden, gate, up, activation, need_hidden=need_hidden)


# What autograd calls: the choice between the two is made below the tracers.
@define_op(
    "gated_mlp_hidden_backward(Tensor grad, Tensor w_down, Tensor gate, Tensor up, "
    "Tensor? grad_low, Tensor? a_down, str activation, bool need_hidden) -> "
    "(Tensor hidden, Tensor grad_gate, Tensor grad_up)",
    composite=True,
)
def _hidden_backward(grad, w_down, gate, up, grad_low, a_down, activation, need_hidden):
    arguments = (grad.contiguous(), w_down, gate, up, grad_low, a_down, activation, need_hidden)
    ops = torch.ops.torchtune_fused
    low = [] if grad_low is None else [grad_low, a_down]
    if gate.is_cuda and ops.gated_linear_takes(gate, w_down, arguments[0], low):
        return ops.gated_linear_backward(*arguments)
    return _backward_reference(*arguments)


@define_op("gated_linear_takes(Tensor x, Tensor w_gate, Tensor w_up, Tensor[] low) -> bool")
def _takes(x, w_gate, w_up, low):
    return False  # Only the compiled library has the kernel, and knows for what.


@torch.library.register_fake("torchtune_fused::gated_linear_backward", lib=LIBRARY)
@torch.library.register_fake("torchtune_fused::gated_mlp_hidden_backward", lib=LIBRARY)
def _(grad, w_down, gate, up, grad_low, a_down, activation, need_hidden):
    hidden = torch.empty_like(gate) if need_hidden else gate.new_empty(0)
    return hidden, torch.empty_like(gate), torch.empty_like(gate)


@torch.library.register_fake("torchtune_fused::gated_linear", lib=LIBRARY)
def _(x, w_gate, w_up, low, b_gate, b_up, activation, save):
    shape = (*x.shape[:-1], w_gate.shape[0])
    saved = shape if save else (0,)
    return x.new_empty(shape), x.new_empty(saved), x.new_empty(saved)
