"""Gradients of the weights of linear layers of one input.

Not public: what `qkv_linear` calls in its backward pass. One kernel for all the layers of a
call, where there is one; elsewhere a product after another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op


def weight_gradients(
    grads: Sequence[Tensor], x: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """``gradᵀ @ x`` of each layer.

    Args:
        grads (Sequence[Tensor]): gradients of the layers' outputs, ``[tokens, out]`` each.
        x (Tensor): input of all layers, ``[tokens, in]``.
        needed (Sequence[bool]): for which layers the gradient is needed.

    Returns:
        list[Tensor | None]: ``[out, in]`` of each, dtype of ``x``. None: not needed.
    """
    wanted = [grad for grad, need in zip(grads, needed, strict=True) if need]
    found = iter(call("weight_gradients", wanted, x) if wanted else [])
    return [next(found) if need else None for need in needed]


# What autograd calls: the choice between the two is made below the tracers.
@define_op("weight_gradients(Tensor[] grads, Tensor x) -> Tensor[]", composite=True)
def _weight_gradients(grads, x):
    ops = torch.ops.torchtune_fused
    if x.is_cuda and ops.grouped_weight_gradients_takes(grads, x):
        return ops.grouped_weight_gradients(grads, x)
    return _reference(grads, x)


@define_op("grouped_weight_gradients(Tensor[] grads, Tensor x) -> Tensor[]")
def _reference(grads, x):
    return [grad.t() @ x for grad in grads]


@define_op("grouped_weight_gradients_takes(Tensor[] grads, Tensor x) -> bool")
def _takes(grads, x):
    return False  # Only the compiled library has the kernel, and knows for what.


@torch.library.register_fake("torchtune_fused::grouped_weight_gradients", lib=LIBRARY)
@torch.library.register_fake("torchtune_fused::weight_gradients", lib=LIBRARY)
def _(grads, x):
    return [x.new_empty(grad.shape[1], x.shape[1]) for grad in grads]
