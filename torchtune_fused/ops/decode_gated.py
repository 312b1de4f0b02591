"""Gate and up projection of a gated MLP for the few tokens of a decoding step.

Shazeer, GLU Variants Improve Transformer, https://arxiv.org/abs/2002.05202.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, check_shape, define_op
from torchtune_fused.ops.decode_linear import check_tensors, normed
from torchtune_fused.ops.gated_activation import ACTIVATIONS, check_activation


def decode_gated(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "silu",
) -> Tensor:
    """``act(linear(norm(x), w_gate, b_gate)) * linear(norm(x), w_up, b_up)``, rounded once.

    On CUDA: fp16 or bf16, at most 16 tokens, ``k`` a multiple of 8. There is no gradient.

    Args:
        x (Tensor): input of shape ``[..., k]``.
        w_gate (Tensor): weight of shape ``[n, k]``, laid out as in ``nn.Linear``.
        w_up (Tensor): weight of shape ``[n, k]``.
        b_gate (Tensor | None): bias of shape ``[n]``.
        b_up (Tensor | None): bias of shape ``[n]``.
        norm_weight (Tensor | None): scale of shape ``[k]`` of an RMSNorm of ``x``; None: no norm.
        eps (float): epsilon of the norm.
        activation (str): ``"silu"``, ``"gelu_tanh"``, ``"gelu"`` or ``"relu"``.

    Returns:
        Tensor: shape ``[..., n]``, dtype of ``x``; what the down projection takes.

    Raises:
        RuntimeError: on CUDA, for what the kernels don't take.
        TypeError: if a tensor has another dtype than ``x``.
        ValueError: if shapes or devices don't fit, or the activation is unknown.
    """
    op = "decode_gated"
    check_activation(op, activation)
    n, k = w_gate.shape
    check_shape(op, "x", x, (*x.shape[:-1], k))
    check_tensors(
        op,
        x,
        w_gate=(w_gate, (n, k)),
        w_up=(w_up, (n, k)),
        b_gate=(b_gate, (n,)),
        b_up=(b_up, (n,)),
        norm_weight=(norm_weight, (k,)),
    )
    return torch.ops.torchtune_fused.decode_gated(
        x.contiguous(), w_gate, w_up, b_gate, b_up, norm_weight, eps, activation
    )


@define_op(
    "decode_gated(Tensor x, Tensor w_gate, Tensor w_up, Tensor? b_gate, Tensor? b_up, "
    "Tensor? norm_weight, float eps, str activation) -> Tensor"
)
def _reference(x, w_gate, w_up, b_gate, b_up, norm_weight, eps, activation):
    x = normed(x, norm_weight, eps)
    act, _ = ACTIVATIONS[activation]
    return act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)


@torch.library.register_fake("torchtune_fused::decode_gated", lib=LIBRARY)
def _(x, w_gate, w_up, b_gate, b_up, norm_weight, eps, activation):
    return x.new_empty((*x.shape[:-1], w_gate.shape[0]))
