"""``activation(x @ w_gateᵀ) * (x @ w_upᵀ)``, the first half of a gated MLP, in one kernel.

Not public: `gated_mlp` is made of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op
from torchtune_fused.ops.gated_activation import gated_activation


def gated_linear(
    x: Tensor, w_gate: Tensor, w_up: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The product, and with ``save`` the two projections, which are empty otherwise."""
    return call("gated_linear", x, w_gate, w_up, activation, save)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, with a faster way for one token in bf16 on a CPU."""
    if x.is_cpu and x.dtype == torch.bfloat16 and x.numel() == x.shape[-1]:
        # The product with a vector is 1.4 times as fast as that of bf16 matrices.
        vector = x.view(-1)
        out = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


@define_op(
    "gated_linear(Tensor x, Tensor w_gate, Tensor w_up, str activation, bool save) -> "
    "(Tensor hidden, Tensor gate, Tensor up)"
)
def _forward(x, w_gate, w_up, activation, save):
    gate, up = linear(x, w_gate), linear(x, w_up)
    hidden = gated_activation(gate, up, activation)
    return (hidden, gate, up) if save else (hidden, x.new_empty(0), x.new_empty(0))


@torch.library.register_fake("torchtune_fused::gated_linear", lib=LIBRARY)
def _(x, w_gate, w_up, activation, save):
    shape = (*x.shape[:-1], w_gate.shape[0])
    saved = shape if save else (0,)
    return x.new_empty(shape), x.new_empty(saved), x.new_empty(saved)
