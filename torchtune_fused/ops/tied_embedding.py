"""An embedding whose weight is used again, by a tied head: both of its gradients in one place.

Left to autograd, the embedding's gradient is a tensor as large as the weight, nearly all zeros,
that is then added to the head's. Here its rows are added straight into the head's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtune_fused.ops._library import LIBRARY, check_floating, check_shape, define_op


def tied_embedding(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``F.embedding(ids, weight)``, and ``weight`` for what else is made of it.

    Args:
        ids (Tensor): int64 of any shape, rows of ``weight``.
        weight (Tensor): floating-point, of shape ``[vocab, dim]``.

    Returns:
        tuple[Tensor, Tensor]: ``[..., dim]``, the rows; and a view of ``weight`` to use in its
        place. The gradient of the view must be nobody else's: the backward pass writes to it.

    Raises:
        TypeError: if ``weight`` is not of a floating-point dtype.
        ValueError: if ``weight`` is not a matrix.
    """
    check_floating("tied_embedding", "weight", weight)
    check_shape("tied_embedding", "weight", weight, (weight.shape[0], weight.shape[-1]))
    return _TiedEmbedding.apply(ids, weight)


class _TiedEmbedding(torch.autograd.Function):
    """Not an op of its own, since an op of torch.library must not return its input."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.vocab = weight.shape[0]
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_weight):
        (ids,) = ctx.saved_tensors
        if grad is None:
            return None, grad_weight
        if grad_weight is None:
            return None, _dense_gradient(grad, ids, ctx.vocab)
        ids = ids.reshape(-1)
        order = ids.int().argsort(stable=True)  # of fewer digits, so sorted in less time
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        torch.ops.torchtune_fused.embedding_add_(grad_weight, ids, order, rows)
        torch.autograd.graph.increment_version(grad_weight)  # who has kept it is to know
        return None, grad_weight


def _dense_gradient(grad: Tensor, ids: Tensor, vocab: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, vocab, -1, False)


# grad_weight[ids[i]] += grad[i]; order sorts ids, those of one id as they come.
@define_op("embedding_add_(Tensor(a!) grad_weight, Tensor ids, Tensor order, Tensor grad) -> ()")
def _reference(grad_weight, ids, order, grad):
    grad_weight += _dense_gradient(grad, ids, grad_weight.shape[0])


@torch.library.register_fake("torchtune_fused::embedding_add_", lib=LIBRARY)
def _(grad_weight, ids, order, grad):
    pass
