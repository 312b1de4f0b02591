"""``hidden = activation(gate) * up``, the middle of a gated MLP, and its gradients.

Not public: what `gated_mlp` and `lora_gated_mlp` are made of between their matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op

_aten = torch.ops.aten

#: Each activation as (forward, backward of (grad, gate)).
ACTIVATIONS = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu_tanh": (
        lambda gate: F.gelu(gate, approximate="tanh"),
        lambda grad, gate: _aten.gelu_backward(grad, gate, approximate="tanh"),
    ),
    "gelu": (F.gelu, _aten.gelu_backward),
    "relu": (F.relu, lambda grad, gate: _aten.threshold_backward(grad, gate, 0)),
}


def check_activation(op: str, activation: str) -> None:
    """Raises a ValueError unless the activation is known."""
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of two contiguous tensors of one shape; no gradients."""
    return call("gated_activation", gate, up, activation)


def gated_activation_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, *, need_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of gate and up from that of their product, and the product computed again.

    Args:
        grad (Tensor): gradient of the product, contiguous. **Overwritten**: it becomes that of up.
        gate (Tensor): as in the forward pass, of the same shape.
        up (Tensor): as in the forward pass.
        activation (str): its name.
        need_hidden (bool): whether the product is wanted; it is empty otherwise.

    Returns:
        tuple[Tensor, Tensor, Tensor]: hidden, the gradient of gate, that of up.
    """
    hidden, grad_gate = call("gated_activation_backward", grad, gate, up, activation, need_hidden)
    return hidden, grad_gate, grad


@define_op("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor")
def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    act, _ = ACTIVATIONS[activation]
    return act(gate).mul_(up)


# grad becomes the gradient of up in place: in training this is where memory peaks.
@define_op(
    "gated_activation_backward(Tensor(a!) grad, Tensor gate, Tensor up, str activation, "
    "bool need_hidden) -> (Tensor hidden, Tensor grad_gate)"
)
def _backward(grad, gate, up, activation, need_hidden):
    act, act_backward = ACTIVATIONS[activation]
    grad_gate = act_backward(grad * up, gate)
    activated = act(gate)
    grad.mul_(activated)
    return (activated.mul_(up) if need_hidden else gate.new_empty(0)), grad_gate


@torch.library.register_fake("torchtune_fused::gated_activation", lib=LIBRARY)
def _(gate, up, activation):
    return torch.empty_like(gate)


@torch.library.register_fake("torchtune_fused::gated_activation_backward", lib=LIBRARY)
def _(grad, gate, up, activation, need_hidden):
    return torch.empty_like(gate) if need_hidden else gate.new_empty(0), torch.empty_like(gate)
