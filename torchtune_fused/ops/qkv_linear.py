"""The projections of attention's queries, keys and values, with or without low-rank adapters.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Sequence

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
from torchtune_fused.ops.rope import Rotation

_NAMES = "q", "k", "v"


def qkv_linear(
    x: Tensor,
    q: AdaptedLinear,
    k: AdaptedLinear,
    v: AdaptedLinear,
    *,
    scale: float = 1.0,
    adapter_inputs: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies three linear layers to one input; all gradients by ``x`` add up inside the products.

    ``x`` itself is what is kept for the backward pass.

    Args:
        x (Tensor): input of shape ``[..., in]``.
        q (AdaptedLinear): the layer of the queries, of any width, with or without an adapter.
        k (AdaptedLinear): that of the keys.
        v (AdaptedLinear): that of the values.
        scale (float): factor of the adapters, ``alpha / rank`` in the paper.
        adapter_inputs (Sequence[Tensor | None]): what each of the three adapters sees in place of
            ``x``, of the same shape: ``dropout(x)`` in training with dropout. None: ``x``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: queries, keys and values, ``[..., out]``, dtype of ``x``.

    Raises:
        TypeError: if a tensor has not the floating-point dtype of ``x``.
        ValueError: if a shape or device doesn't fit, or there is half an adapter.
    """
    tensors = check_layers("qkv_linear", x, (q, k, v), adapter_inputs)
    return call("qkv_linear", x, *tensors, scale)[:3]


def check_layers(
    op: str, x: Tensor, layers: Sequence[AdaptedLinear], adapter_inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The tensors of the three layers as an op takes them, or raises if they don't fit ``x``."""
    check_floating(op, "x", x)
    for name, layer, seen in zip(_NAMES, layers, adapter_inputs, strict=True):
        check_adapted(op, f"_{name}", x, (layer.weight.shape[0], x.shape[-1]), layer)
        if seen is not None:
            check_tensor(op, f"adapter_inputs of {name}", seen, x.shape, "x", x)
    parts = "weight", "bias", "a", "b"
    return [*(getattr(layer, part) for part in parts for layer in layers), *adapter_inputs]


# low, [..., ranks], lies as adapters.py says.
@define_op(
    "qkv_linear(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, "
    "Tensor? bias_q, Tensor? bias_k, Tensor? bias_v, Tensor? a_q, Tensor? a_k, Tensor? a_v, "
    "Tensor? b_q, Tensor? b_k, Tensor? b_v, Tensor? seen_q, Tensor? seen_k, Tensor? seen_v, "
    "float scale) -> (Tensor q, Tensor k, Tensor v, Tensor low)",
    composite=True,
)
def project(x, *arguments, rotation: Rotation | None = None):
    """The forward pass: queries and keys, rotated if so asked, values and ``low``."""
    *tensors, scale = arguments
    weights, biases, a, b, seen = _by_kind(tensors)
    rows = x.contiguous()
    adapted, own_low = _adapted(a), [None] * 3
    low = x.new_empty(0)
    if adapted:
        inputs = [rows if seen[i] is None else seen[i] for i in adapted]
        matrices = [a[i] for i in adapted]
        low = low_rank(inputs, matrices, scale)
        columns = low.split([matrix.shape[0] for matrix in matrices], dim=-1)
        for i, own in zip(adapted, columns, strict=True):
            own_low[i] = own
    return *grouped_linear(rows, weights, biases, own_low, b, rotation=rotation), low


def _by_kind(tensors: Sequence[Tensor | None]) -> list[Sequence[Tensor | None]]:
    """Of tensors that come for queries, keys and values each, those of one kind together."""
    return [tensors[i : i + 3] for i in range(0, len(tensors), 3)]


def _adapted(a: Sequence[Tensor | None]) -> list[int]:
    return [i for i in range(3) if a[i] is not None]


@torch.library.register_fake("torchtune_fused::qkv_linear", lib=LIBRARY)
def fake_projections(x, *arguments):
    """What `project` gives, without its numbers."""
    weights, _, a, *_ = _by_kind(arguments[:15])
    out = (x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights)
    rank = sum(a[i].shape[0] for i in _adapted(a))
    return *out, x.new_empty((*x.shape[:-1], rank) if rank else 0)


def kept_tensors(x, tensors, low, needs):
    """What `projection_gradients` needs; ``needs`` is as there."""
    weights, _, a, b, seen = _by_kind(tensors)
    # With dropout, x itself serves only the gradients of weights that are usually frozen.
    serves = any(needs[1:4]) or any(seen[i] is None for i in _adapted(a))
    return x if serves else None, *weights, *a, *b, *seen, low


def projection_gradients(grads, kept, scale, needs):
    """The backward pass: of the projections' gradients, those of ``x`` and all tensors needed.

    Args:
        grads (Sequence[Tensor]): of queries, keys and values, ``[..., out]``.
        kept (Sequence[Tensor | None]): what `kept_tensors` gave.
        scale (float): factor of the adapters.
        needs (Sequence[bool]): of ``x`` and the 15 tensors of the op.

    Returns:
        list[Tensor | None]: as many.
    """
    x, *tensors, low = kept
    weights, a, b, seen = _by_kind(tensors)
    need_x, *others = needs
    need_weights, need_biases, need_a, need_b, need_seen = _by_kind(others)
    shape = (*grads[0].shape[:-1], weights[0].shape[1])
    grads = [rows_of(grad) for grad in grads]
    rows = None if x is None else rows_of(x)

    terms = list(zip(grads, weights, strict=True))  # of the gradient of x
    grad_a, grad_b, grad_seen = [None] * 3, [None] * 3, [None] * 3
    adapted = _adapted(a)
    if adapted and (need_x or any(need_seen) or any(need_a) or any(need_b)):
        grad_low, grad_bs = adapter_backward(
            [grads[i] for i in adapted], [b[i] for i in adapted], rows_of(low), scale
        )
        for i, grad_of_b in zip(adapted, grad_bs, strict=True):
            grad_b[i] = grad_of_b if need_b[i] else None
        # Adapters that see the same share their products.
        groups = [adapted] if all(seen[i] is None for i in adapted) else [[i] for i in adapted]
        ranks = [[a[i].shape[0] for i in group] for group in groups]
        parts = grad_low.split([sum(own) for own in ranks], dim=1)
        for group, own, part in zip(groups, ranks, parts, strict=True):
            first = group[0]
            matrix = a[first] if len(group) == 1 else torch.cat([a[i] for i in group])
            if seen[first] is None:
                terms.append((part, matrix))
            if need_seen[first]:
                grad_seen[first] = (part @ matrix).view(shape)
            if any(need_a[i] for i in group):
                grad_matrix = part.t() @ (rows if seen[first] is None else rows_of(seen[first]))
                for i, grad_of_a in zip(group, grad_matrix.split(own), strict=True):
                    grad_a[i] = grad_of_a if need_a[i] else None

    return [
        sum_of_products(*zip(*terms, strict=True)).view(shape) if need_x else None,
        *(g.t() @ rows if need else None for g, need in zip(grads, need_weights, strict=True)),
        *(g.sum(0) if need else None for g, need in zip(grads, need_biases, strict=True)),
        *grad_a,
        *grad_b,
        *grad_seen,
    ]


def _setup_context(ctx, inputs, output):
    x, *tensors, ctx.scale = inputs
    ctx.save_for_backward(*kept_tensors(x, tensors, output[3], ctx.needs_input_grad))


def _autograd(ctx, *grads):
    needs = ctx.needs_input_grad[:16]
    return *projection_gradients(grads, ctx.saved_tensors, ctx.scale, needs), None


register_autograd("qkv_linear", _autograd, _setup_context, differentiable=3)
