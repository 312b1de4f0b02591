"""Masks as the attention op takes them, made once for all layers of a model."""

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.weak import WeakIdKeyDictionary
from torchtune.modules.attention_utils import packed_block_causal_mask

from torchtune_fused.ops import MaskTiles, document_bounds, mask_tiles
from torchtune_fused.ops.attention_mask import TILE

# The rule inside torchtune's BlockMasks of packed documents, which closes over the document ids.
_DOCUMENT_RULE = next(
    (
        constant
        for constant in packed_block_causal_mask.__code__.co_consts
        if isinstance(constant, CodeType) and constant.co_freevars == ("document_ids",)
    ),
    None,
)
_CHUNK = 1 << 26  # elements of a dense mask that may be in memory at once


def mask_arguments(mask: Tensor | BlockMask) -> dict[str, Any]:
    """A bool mask or BlockMask as arguments of `attention`, in the form of its CUDA kernels."""
    if not isinstance(mask, BlockMask):
        return {"mask": tiles_of(mask)}
    if document_ids(mask) is None:
        return {"mask": block_tiles(mask)}
    return {"documents": _packed_documents(mask), "causal": True}


def document_ids(mask: BlockMask) -> Tensor | None:
    """The ids ``[b, s]`` behind what torchtune's ``packed_block_causal_mask`` returns, or None.

    They tell, with the rule that nobody sees what comes later, all that such a mask says.
    """
    rule = mask.mask_mod
    if _DOCUMENT_RULE is None or getattr(rule, "__code__", None) is not _DOCUMENT_RULE:
        return None
    return rule.__closure__[0].cell_contents


def _once_per_mask(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Lets the layers that are handed the same mask share what is made of it.

    It is kept for as long as the mask lives and is not written to.
    """
    made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @functools.wraps(make)
    def shared(mask: Tensor | BlockMask) -> Any:
        if _must_not_keep(mask):
            return make(mask)
        version = mask._version if isinstance(mask, Tensor) else 0
        known = made.get(mask)
        if known is None or known[0] != version:
            known = made[mask] = version, make(mask)
        return known[1]

    return shared


def _must_not_keep(mask: Tensor | BlockMask) -> bool:
    # A traced or captured step has to compute it each time it runs. Inference tensors have no
    # version, and what is made in inference mode can't be saved for a backward pass later.
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or (isinstance(mask, Tensor) and mask.is_inference())
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


tiles_of = _once_per_mask(mask_tiles)


@_once_per_mask
def dense_mask(mask: BlockMask) -> Tensor:
    """The bool mask of shape ``[b or 1, h or 1, s, s_kv]`` that a BlockMask stands for."""
    return _rows_of(mask, 0, mask.shape[2])


@_once_per_mask
def block_tiles(mask: BlockMask) -> MaskTiles:
    """A BlockMask of any kind as bits and tiles, without ever having all of it in memory."""
    b, h, s, s_kv = mask.shape
    rows = max(_CHUNK // (b * h * s_kv * TILE), 1) * TILE
    parts = [mask_tiles(_rows_of(mask, first, min(rows, s - first))) for first in range(0, s, rows)]
    return MaskTiles(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))


@_once_per_mask
def _packed_documents(mask: BlockMask) -> Tensor:
    return document_bounds(document_ids(mask))


def _rows_of(mask: BlockMask, first: int, rows: int) -> Tensor:
    """Some rows of the dense form: what is in one of the blocks and fulfils the rule."""
    b, h, _, s_kv = mask.shape
    blocks = mask.to_dense().bool()
    q_size, kv_size = mask.BLOCK_SIZE

    def rule(b, h, q, kv):
        q = q + first
        return blocks[b, h, q // q_size, kv // kv_size] & mask.mask_mod(b, h, q, kv)

    return create_mask(rule, b, h, rows, s_kv, device=mask.kv_num_blocks.device)
