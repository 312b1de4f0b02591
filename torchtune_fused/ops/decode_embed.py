"""The embedding of the few tokens of a decoding step, written to where the step reads it."""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, check_shape, define_op
from torchtune_fused.ops.decode_linear import check_tensors


def decode_embed_(out: Tensor, ids: Tensor, weight: Tensor) -> None:
    """Put rows of an embedding into ``out``.

    On CUDA: fp16 or bf16, at most 16 tokens, ``dim`` a multiple of 8. There is no gradient.

    Args:
        out (Tensor): of shape ``[tokens, dim]``, in the dtype of ``weight``; overwritten.
        ids (Tensor): int64 of shape ``[tokens]``, rows of ``weight``. On CUDA any other is an
            error of the whole process, as it is in PyTorch.
        weight (Tensor): of shape ``[vocab, dim]``.

    Raises:
        RuntimeError: on CUDA, for what the kernel doesn't take.
        TypeError: if ``ids`` is not int64, or ``out`` of another dtype than ``weight``.
        ValueError: if shapes or devices don't fit.
    """
    op = "decode_embed_"
    if ids.dtype != torch.int64:
        raise TypeError(f"{op}: ids must be int64, got {ids.dtype}")
    check_shape(op, "weight", weight, (weight.shape[0], weight.shape[-1]))
    check_shape(op, "ids", ids, (ids.numel(),))
    check_tensors(op, weight, out=(out, (ids.numel(), weight.shape[1])))
    torch.ops.torchtune_fused.decode_embed_(out, ids.contiguous(), weight)


@define_op("decode_embed_(Tensor(a!) out, Tensor ids, Tensor weight) -> ()")
def _reference(out, ids, weight):
    torch.index_select(weight, 0, ids, out=out)


@torch.library.register_fake("torchtune_fused::decode_embed_", lib=LIBRARY)
def _(out, ids, weight):
    pass
