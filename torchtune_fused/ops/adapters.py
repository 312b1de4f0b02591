"""Low-rank adapters (LoRA) of several linear layers at once, ``scale * (x @ aᵀ) @ bᵀ`` each.

Not public: what `lora_linear`, `qkv_linear` and `lora_gated_mlp` are made of. The adapters' narrow
inputs lie side by side: ``low``, ``[..., ranks]``, is ``scale * x @ [a₀; a₁; …]ᵀ``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, check_tensor, define_op
from torchtune_fused.ops.grouped_product import rows_of


class AdaptedLinear(NamedTuple):
    """A linear layer, ``x @ weightᵀ + bias``, and its adapter, ``scale * (x @ aᵀ) @ bᵀ``.

    Args:
        weight (Tensor): ``[out, in]``.
        a (Tensor | None): the adapter's first matrix, ``[rank, in]``; None: there is no adapter.
        b (Tensor | None): its second, ``[out, rank]``.
        bias (Tensor | None): ``[out]``.
    """

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    bias: Tensor | None = None


def check_adapted(
    op: str, suffix: str, x: Tensor, shape: tuple[int, int], layer: AdaptedLinear
) -> None:
    """Raises unless a layer's tensors fit a weight of ``shape`` and an input ``x``."""
    weight, a, b, bias = layer
    n, k = shape
    check_tensor(op, f"weight{suffix}", weight, (n, k), "x", x)
    if (a is None) != (b is None):
        raise ValueError(f"{op}: a{suffix} and b{suffix} come together, got one of them")
    if a is not None:
        rank = a.shape[0]
        check_tensor(op, f"a{suffix}", a, (rank, k), "x", x)
        check_tensor(op, f"b{suffix}", b, (n, rank), "x", x)
    if bias is not None:
        check_tensor(op, f"bias{suffix}", bias, (n,), "x", x)


def low_rank(inputs: Sequence[Tensor], matrices: Sequence[Tensor], scale: float) -> Tensor:
    """``scale * input @ aᵀ`` of each adapter side by side; inside of an op only.

    Args:
        inputs (Sequence[Tensor]): what each adapter sees, ``[..., in]``. One product, if that is
            the same tensor for all.
        matrices (Sequence[Tensor]): ``[rank, in]`` of each.
        scale (float): factor.

    Returns:
        Tensor: shape ``[..., ranks]``.
    """
    first = inputs[0]
    if all(x is first for x in inputs):
        inputs, matrices = [first], [matrices[0] if len(matrices) == 1 else torch.cat(matrices)]
    ranks = [a.shape[0] for a in matrices]
    low = first.new_empty((*first.shape[:-1], sum(ranks)))
    for x, a, own in zip(inputs, matrices, rows_of(low).split(ranks, dim=1), strict=True):
        # The product brings its factor along: beta = 0 means that what was there is not read.
        own.addmm_(rows_of(x), a.t(), beta=0, alpha=scale)
    return low


def adapter_backward(
    grads: Sequence[Tensor], bs: Sequence[Tensor], low: Tensor, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of what is as narrow as the adapters.

    Args:
        grads (Sequence[Tensor]): of the output of each adapter, ``[rows, out]``.
        bs (Sequence[Tensor]): the second matrix of each, ``[out, rank]``.
        low (Tensor): as `low_rank` gave it, ``[rows, ranks]``.
        scale (float): factor.

    Returns:
        tuple[Tensor, list[Tensor]]: ``scale * grad @ b`` of each side by side, ``[rows, ranks]``:
        the gradient of ``input @ aᵀ``; and the gradient of each second matrix.
    """
    return call("adapter_backward", list(grads), list(bs), low, scale)


# What autograd calls: the choice between the two is made below the tracers.
@define_op(
    "adapter_backward(Tensor[] grads, Tensor[] bs, Tensor low, float scale) -> "
    "(Tensor grad_low, Tensor[] grad_bs)",
    composite=True,
)
def _backward(grads, bs, low, scale):
    ops = torch.ops.torchtune_fused
    if low.is_cuda and ops.adapter_gradients_takes(grads, bs, low):
        return ops.adapter_gradients(grads, bs, low, scale)
    return _reference(grads, bs, low, scale)


@define_op(
    "adapter_gradients(Tensor[] grads, Tensor[] bs, Tensor low, float scale) -> "
    "(Tensor grad_low, Tensor[] grad_bs)"
)
def _reference(grads, bs, low, scale):
    ranks = [b.shape[1] for b in bs]
    grad_low, grad_bs = torch.empty_like(low), []
    columns = grad_low.split(ranks, dim=1), low.split(ranks, dim=1)
    for grad, b, own_grad_low, own_low in zip(grads, bs, *columns, strict=True):
        own_grad_low.addmm_(grad, b, beta=0, alpha=scale)
        grad_bs.append(grad.t() @ own_low)
    return grad_low, grad_bs


@define_op("adapter_gradients_takes(Tensor[] grads, Tensor[] bs, Tensor low) -> bool")
def _takes(grads, bs, low):
    return False  # Only the compiled library has the kernel, and knows for what.


@torch.library.register_fake("torchtune_fused::adapter_backward", lib=LIBRARY)
@torch.library.register_fake("torchtune_fused::adapter_gradients", lib=LIBRARY)
def _(grads, bs, low, scale):
    return torch.empty_like(low), [b.new_empty(b.shape) for b in bs]
