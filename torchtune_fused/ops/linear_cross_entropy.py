"""Cross-entropy of a linear layer's output, whose logits are never stored as a whole.

Tokens go through in chunks: logits, losses, the gradient over the logits, and its two products. So
the gradients are there when the losses are, and the backward pass has nothing left but a factor.
Method: Hsu et al., Liger Kernel, https://arxiv.org/abs/2410.10989; z-loss: Chowdhery et al., PaLM,
https://arxiv.org/abs/2204.02311.
"""

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_device,
    check_floating,
    check_shape,
    check_softcap,
    check_tensor,
    define_op,
    is_traced,
    register_autograd,
)
from torchtune_fused.ops.cross_entropy import cross_entropy_
from torchtune_fused.ops.scale import scale_

# Products of fewer tokens than this leave a GPU idle.
_MIN_CHUNK = 1024
# Each chunk rounds the sum of the weight's gradient to its dtype once more.
_MAX_CHUNKS = 8

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(hidden @ weightᵀ, targets)``, without the logits' memory.

    With ``"mean"`` and ``"sum"``, gradients are computed along with the loss, and the backward pass
    scales them in place, where they reach it with another factor than 1: it can run once. With
    ``"none"`` it computes the logits anew.

    Args:
        hidden (Tensor): hidden states of shape ``[..., dim]``.
        weight (Tensor): the head's weight of shape ``[vocab, dim]``, dtype of ``hidden``. No
            gradient is computed for a frozen one.
        targets (Tensor): int64 of shape ``[...]``, ids below ``vocab`` or ``ignore_index``. Others
            are an error on the CPU; on a GPU their loss is NaN.
        ignore_index (int): target of tokens which have loss 0 and don't count for the mean.
        softcap (float | None): logits are ``softcap * tanh(logits / softcap)`` first. Default: not.
        z_loss (float): adds ``z_loss * logsumexp(logits)²`` to each loss.
        reduction (str): ``"mean"`` over the tokens that are not ignored (NaN without any, as in
            PyTorch), ``"sum"`` or ``"none"``.

    Returns:
        Tensor: fp32 (fp64 for fp64 ``hidden``), a scalar or, with ``"none"``, of shape ``[...]``.

    Raises:
        TypeError: if ``hidden`` is not of a floating-point dtype, ``weight`` of another one, or
            ``targets`` not int64.
        ValueError: if a shape or device doesn't fit, the softcap is not positive, or the reduction
            is unknown.
    """
    op = "linear_cross_entropy"
    check_floating(op, "hidden", hidden)
    check_tensor(op, "weight", weight, (weight.shape[0], hidden.shape[-1]), "hidden", hidden)
    check_shape(op, "targets", targets, hidden.shape[:-1])
    check_device(op, "targets", targets, "hidden", hidden)
    if targets.dtype != torch.int64:
        raise TypeError(f"{op}: targets must be torch.int64, got {targets.dtype}")
    check_softcap(op, softcap)
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    rows, ids = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    arguments = rows, weight, ids, ignore_index, softcap or 0.0, z_loss
    if reduction == "none":
        return call("linear_cross_entropy", *arguments).view(targets.shape)
    grads = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    if reduction == "sum":
        return call("linear_cross_entropy_sum", *arguments, None, *grads)[0]
    count = (ids != ignore_index).sum()
    # A division by no tokens would make the gradients NaN, not only the loss.
    share = count.clamp(min=1).to(_loss_dtype(hidden)).reciprocal()
    if hidden.dtype == torch.float16:
        # So small a factor would take gradients below fp16's range, out of a GradScaler's reach.
        mean = call("linear_cross_entropy_sum", *arguments, None, *grads)[0] * share
    else:
        mean = call("linear_cross_entropy_sum", *arguments, share, *grads)[0]
    return torch.where(count > 0, mean, torch.nan)


def _chunk_size(tokens: int, dim: int, grad_weight: bool) -> int:
    """Tokens of a chunk. Its logits take no more memory than the gradient of the weight does."""
    at_most = max(_MIN_CHUNK, dim if grad_weight else 0, -(-tokens // _MAX_CHUNKS))
    chunks = -(-tokens // at_most)
    return -(-tokens // max(1, chunks) // 128) * 128  # equal shares, in whole tiles


def _run(hidden, weight, targets, grad, ignore_index, softcap, z_loss, for_hidden, for_weight):
    """Losses and, where asked for, gradients; empty tensors where not."""
    tokens, vocab = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(tokens, dtype=_loss_dtype(hidden))
    grad_hidden = hidden.new_empty(hidden.shape if for_hidden else 0)
    grad_weight = weight.new_empty(weight.shape if for_weight else 0)
    if tokens == 0:
        grad_weight.zero_()
    size = _chunk_size(tokens, hidden.shape[1], for_weight)
    # The kernel wants rows that start at multiples of 16 bytes, whatever the vocabulary; on a CPU
    # bf16 products would read the padding.
    stride = -(-vocab // 8) * 8 if hidden.is_cuda else vocab
    buffer = hidden.new_empty(min(size, tokens), stride)[:, :vocab]
    for start in range(0, tokens, size or 1):
        chunk = slice(start, start + size)
        rows = hidden[chunk]
        logits = torch.mm(rows, weight.t(), out=buffer[: rows.shape[0]])
        losses[chunk] = cross_entropy_(
            logits,
            targets[chunk],
            None if grad is None else grad[chunk],
            ignore_index=ignore_index,
            softcap=softcap,
            z_loss=z_loss,
            backward=for_hidden or for_weight,
        )
        if for_hidden:
            torch.mm(logits, weight, out=grad_hidden[chunk])
        if for_weight:
            grad_weight.addmm_(logits.t(), rows, beta=1 if start else 0)
    return losses, grad_hidden, grad_weight


def _loss_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


@define_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "float softcap, float z_loss) -> Tensor",
    composite=True,
)
def _forward(hidden, weight, targets, *options):
    return _run(hidden, weight, targets, None, *options, False, False)[0]


@define_op(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, "
    "int ignore_index, float softcap, float z_loss, bool for_hidden, bool for_weight) -> "
    "(Tensor grad_hidden, Tensor grad_weight)",
    composite=True,
)
def _backward(grad, hidden, weight, targets, *options):
    return _run(hidden, weight, targets, grad.contiguous(), *options)[1:]


@define_op(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "float softcap, float z_loss, Tensor? factor, bool for_hidden, bool for_weight) -> "
    "(Tensor total, Tensor grad_hidden, Tensor grad_weight)",
    composite=True,
)
def _sum(hidden, weight, targets, ignore_index, softcap, z_loss, factor, *wanted):
    # The factor, one element of the losses' dtype, is that of the sum and of its gradients.
    grad = None if factor is None else factor.expand(targets.shape).contiguous()
    losses, *grads = _run(hidden, weight, targets, grad, ignore_index, softcap, z_loss, *wanted)
    total = losses.sum()
    return total if factor is None else total * factor, *grads


@torch.library.register_fake("torchtune_fused::linear_cross_entropy", lib=LIBRARY)
def _(hidden, weight, targets, ignore_index, softcap, z_loss):
    return hidden.new_empty(targets.shape, dtype=_loss_dtype(hidden))


@torch.library.register_fake("torchtune_fused::linear_cross_entropy_backward", lib=LIBRARY)
def _fake_backward(
    grad, hidden, weight, targets, ignore_index, softcap, z_loss, for_hidden, for_weight
):
    grad_hidden = hidden.new_empty(hidden.shape if for_hidden else 0)
    return grad_hidden, weight.new_empty(weight.shape if for_weight else 0)


@torch.library.register_fake("torchtune_fused::linear_cross_entropy_sum", lib=LIBRARY)
def _(hidden, weight, targets, ignore_index, softcap, z_loss, factor, *wanted):
    total = hidden.new_empty((), dtype=_loss_dtype(hidden))
    return total, *_fake_backward(None, hidden, weight, targets, None, None, None, *wanted)


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _autograd(ctx, grad):
    needed = ctx.needs_input_grad[:2]
    grads = call("linear_cross_entropy_backward", grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *(None,) * 4


register_autograd("linear_cross_entropy", _autograd, _setup_context)


def _setup_context_sum(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])


def _autograd_sum(ctx, grad):
    saved = zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    return *(_scaled(t, grad) if need else None for t, need in saved), *(None,) * 7


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    if is_traced():
        return (at_least_fp32(x) * factor).to(x.dtype)  # the compiler sees to the memory
    # In place: the gradient of a head's weight may be what memory has room for once.
    scale_(x, factor)
    torch.autograd.graph.increment_version(x)  # so a second backward pass is an error
    return x


register_autograd("linear_cross_entropy_sum", _autograd_sum, _setup_context_sum)
