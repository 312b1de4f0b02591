"""Cross-entropy of logits that are not needed afterwards: their gradient is written over them."""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, at_least_fp32, call, define_op


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    grad: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    backward: bool = True,
) -> Tensor:
    """The losses of `linear_cross_entropy` for one chunk of logits, which it uses up.

    Args:
        logits (Tensor): shape ``[n, vocab]``, dense rows that start at multiples of 16 bytes.
            Replaced by the gradient of the losses by them.
        targets (Tensor): int64 of shape ``[n]``.
        grad (Tensor | None): gradient of each loss, shape ``[n]``, dtype of the losses. Default: 1.
        ignore_index (int): target of rows without a loss.
        softcap (float): see `linear_cross_entropy`; 0 for none.
        z_loss (float): see `linear_cross_entropy`.
        backward (bool): whether to compute the gradient; else the logits stay as they are.

    Returns:
        Tensor: losses of shape ``[n]``, fp32 (fp64 for fp64 logits).
    """
    return call("cross_entropy_", logits, targets, grad, ignore_index, softcap, z_loss, backward)


@define_op(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, Tensor? grad, int ignore_index, "
    "float softcap, float z_loss, bool backward) -> Tensor"
)
def _reference(logits, targets, grad, ignore_index, softcap, z_loss, backward):
    x = at_least_fp32(logits)
    if softcap:
        x = torch.tanh(x / softcap) * softcap
    counts = targets != ignore_index
    at = torch.where(counts, targets, 0).unsqueeze(1)
    lse = x.logsumexp(1)
    losses = lse - x.gather(1, at).squeeze(1) + z_loss * lse.square()
    losses.masked_fill_(~counts, 0)
    if backward:
        # d loss / d x = softmax(x) * (1 + 2 * z_loss * lse) - onehot(target)
        by_x = torch.sub(x, lse.unsqueeze(1)).exp_()
        by_x.mul_((1 + 2 * z_loss * lse).unsqueeze(1))
        by_x.scatter_add_(1, at, by_x.new_full((), -1).expand_as(at))
        if softcap:
            by_x.mul_(1 - (x / softcap).square_())
        if grad is not None:
            by_x.mul_(grad.unsqueeze(1))
        logits.copy_(by_x.masked_fill_(~counts.unsqueeze(1), 0))
    return losses


@torch.library.register_fake("torchtune_fused::cross_entropy_", lib=LIBRARY)
def _(logits, targets, grad, ignore_index, softcap, z_loss, backward):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(targets.shape, dtype=dtype)
