"""Linear layer for the few tokens of a decoding step, with what surrounds it fused in.

At a handful of tokens a linear layer costs what reading its weights costs, so the norm before and
the residual addition after it ride along for nothing. Output and down projections, and the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, at_least_fp32, check_like, check_shape, define_op

#: Tokens (batch times new positions) that the CUDA kernels take in one call.
MAX_DECODE_TOKENS = 16


def decode_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    fp32_out: bool = False,
) -> Tensor:
    """``linear(norm(x), weight, bias) + residual``, summed in fp32 and rounded once.

    On CUDA: fp16 or bf16, at most 16 tokens, ``k`` a multiple of 8. There is no gradient.

    Args:
        x (Tensor): input of shape ``[..., k]``.
        weight (Tensor): weight of shape ``[n, k]``, laid out as in ``nn.Linear``.
        bias (Tensor | None): bias of shape ``[n]``.
        residual (Tensor | None): what to add to the output, of its shape.
        norm_weight (Tensor | None): scale of shape ``[k]`` of an RMSNorm of ``x``; None: no norm.
        eps (float): epsilon of the norm.
        fp32_out (bool): return fp32, as torchtune wants its logits, instead of the dtype of ``x``.

    Returns:
        Tensor: shape ``[..., n]``.

    Raises:
        RuntimeError: on CUDA, for what the kernels don't take.
        TypeError: if a tensor has another dtype than ``x``.
        ValueError: if shapes or devices don't fit.
    """
    op = "decode_linear"
    n, k = weight.shape
    check_shape(op, "x", x, (*x.shape[:-1], k))
    check_tensors(
        op,
        x,
        weight=(weight, (n, k)),
        bias=(bias, (n,)),
        residual=(residual, (*x.shape[:-1], n)),
        norm_weight=(norm_weight, (k,)),
    )
    return torch.ops.torchtune_fused.decode_linear(
        x.contiguous(), weight, bias, residual, norm_weight, eps, fp32_out
    )


def check_tensors(op: str, x: Tensor, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raises unless each tensor given has its shape, and dtype and device of ``x``."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None:
            check_shape(op, name, tensor, shape)
            check_like(op, name, tensor, "x", x)


def normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """The input of a decoding linear: RMSNorm of ``x`` if there is a weight for it."""
    if norm_weight is None:
        return x
    wide = at_least_fp32(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * norm_weight).to(x.dtype)


@define_op(
    "decode_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, "
    "float eps, bool fp32_out) -> Tensor"
)
def _reference(x, weight, bias, residual, norm_weight, eps, fp32_out):
    out = F.linear(normed(x, norm_weight, eps), weight, bias)
    if residual is not None:
        out = out + residual
    return out.float() if fp32_out else out


@torch.library.register_fake("torchtune_fused::decode_linear", lib=LIBRARY)
def _(x, weight, bias, residual, norm_weight, eps, fp32_out):
    dtype = torch.float32 if fp32_out else x.dtype
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
