"""Sums of matrix products: linear layers of one input with adapters, and that input's gradient.

Not public: what `qkv_linear`, `lora_linear` and the gated MLPs are made of. One kernel for all the
products of a call, where there is one; elsewhere each is added into the sum by the product itself.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op
from torchtune_fused.ops.qk_norm_rope import rotate_heads
from torchtune_fused.ops.rope import Rotation


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    low: Sequence[Tensor | None],
    bs: Sequence[Tensor | None],
    addend: Tensor | None = None,
    rotation: Rotation | None = None,
) -> list[Tensor]:
    """``x @ weightᵀ + bias + low @ bᵀ`` of each layer; inside of an op only.

    Args:
        x (Tensor): input of all layers, ``[..., in]``.
        weights (Sequence[Tensor]): ``[out, in]`` of each.
        biases (Sequence[Tensor | None]): ``[out]``.
        low (Sequence[Tensor | None]): input of each layer's adapter, ``[..., rank]``. None: it has
            none.
        bs (Sequence[Tensor | None]): the adapter's second matrix, ``[out, rank]``.
        addend (Tensor | None): what to add to the output of the only layer, of its shape.
        rotation (Rotation | None): turns the heads of the first two of three layers, queries and
            keys of an ``x`` of shape ``[b, s, in]``.

    Returns:
        list[Tensor]: ``[..., out]`` of each.
    """
    rows, shape = rows_of(x), x.shape[:-1]
    low = [None if t is None else rows_of(t) for t in low]
    if x.is_cuda and all(bias is None for bias in biases):
        firsts, seconds, terms = [], [], []
        for weight, own, b in zip(weights, low, bs, strict=True):
            firsts += [rows] if own is None else [rows, own]
            seconds += [weight] if own is None else [weight, b]
            terms.append(1 if own is None else 2)
        ops = torch.ops.torchtune_fused
        others = () if rotation is None else (*rotation, x.shape[1])
        product = (
            firsts,
            seconds,
            terms,
            False,
            None if addend is None else rows_of(addend),
            *others,
        )
        if ops.grouped_product_takes(*product):
            return [_reshaped(out, shape) for out in ops.grouped_product(*product)]
    if rotation is not None:
        q, k, v = grouped_linear(x, weights, biases, low, bs)
        return [*rotate_heads(q, k, rotation), v]
    outs = [F.linear(rows, w, bias) for w, bias in zip(weights, biases, strict=True)]
    for out, own, b in zip(outs, low, bs, strict=True):
        if own is not None:
            out.addmm_(own, b.t())
    if addend is not None:
        outs[0] += rows_of(addend)
    return [_reshaped(out, shape) for out in outs]


def _reshaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    # As F.linear does it: the result is no view, of which FSDP2 warns at the end of a layer.
    return torch.ops.aten._unsafe_view.default(rows, [*shape, rows.shape[1]])


def sum_of_products(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Tensor:
    """The sum of ``first @ second``.

    Args:
        firsts (Sequence[Tensor]): ``[rows, k]`` each.
        seconds (Sequence[Tensor]): ``[k, n]`` each.

    Returns:
        Tensor: shape ``[rows, n]``.
    """
    return call("sum_of_products", list(firsts), list(seconds))


def rows_of(x: Tensor) -> Tensor:
    """``x`` as a matrix, its last dimension across."""
    return x.reshape(-1, x.shape[-1])


# Each output is the sum of its next terms[i] products, first @ second with `across`, else
# first @ secondᵀ; the addend, if any, is added to the only one. With cos, all outputs but the last
# are heads, and rotated; `steps` tokens stand in a row.
@define_op(
    "grouped_product(Tensor[] firsts, Tensor[] seconds, int[] terms, bool across, "
    "Tensor? addend=None, Tensor? cos=None, Tensor? sin=None, Tensor? input_pos=None, "
    "bool interleaved=False, int steps=0) -> Tensor[]"
)
def _reference(
    firsts,
    seconds,
    terms,
    across,
    addend=None,
    cos=None,
    sin=None,
    input_pos=None,
    interleaved=False,
    steps=0,
):
    outs, start = [], 0
    for count in terms:
        own = slice(start, start + count)
        start += count
        outs.append(_add_up(firsts[own], [s if across else s.t() for s in seconds[own]]))
    if addend is not None:
        outs[0] += addend
    if cos is not None:
        for out in outs[:-1]:
            heads = out.view(-1, steps, out.shape[1] // (2 * cos.shape[1]), 2 * cos.shape[1])
            out.copy_(call("rope", heads, cos, sin, input_pos, interleaved, False).view_as(out))
    return outs


def _add_up(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Tensor:
    out = firsts[0] @ seconds[0]
    for first, second in zip(firsts[1:], seconds[1:], strict=True):
        out.addmm_(first, second)  # into the sum itself, where torch.addmm would copy it first
    return out


@torch.library.register_fake("torchtune_fused::grouped_product", lib=LIBRARY)
def _(firsts, seconds, terms, across, *_):
    ends = [sum(terms[: i + 1]) for i in range(len(terms))]
    return [
        firsts[0].new_empty(firsts[0].shape[0], seconds[end - 1].shape[1 if across else 0])
        for end in ends
    ]


@define_op(
    "grouped_product_takes(Tensor[] firsts, Tensor[] seconds, int[] terms, bool across, "
    "Tensor? addend=None, Tensor? cos=None, Tensor? sin=None, Tensor? input_pos=None, "
    "bool interleaved=False, int steps=0) -> bool"
)
def _takes(firsts, seconds, terms, across, *_):
    return False  # Only the compiled library has the kernel, and knows for what.


# What autograd calls: the choice between the two is made below the tracers.
@define_op("sum_of_products(Tensor[] firsts, Tensor[] seconds) -> Tensor", composite=True)
def _sum_of_products(firsts, seconds):
    ops, terms = torch.ops.torchtune_fused, [len(firsts)]
    if firsts[0].is_cuda and ops.grouped_product_takes(firsts, seconds, terms, True):
        return ops.grouped_product(firsts, seconds, terms, True)[0]
    return _add_up(firsts, seconds)


@torch.library.register_fake("torchtune_fused::sum_of_products", lib=LIBRARY)
def _(firsts, seconds):
    return firsts[0].new_empty(firsts[0].shape[0], seconds[0].shape[1])
