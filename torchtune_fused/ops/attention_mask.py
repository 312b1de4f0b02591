"""Masks in the form that the attention kernels read, where it depends on data.

A dense mask becomes one bit for each query and key, with a summary of each tile of 64 x 64, so that
a kernel skips what is hidden and looks at bits only where it must: block-sparse attention, Dao et
al., FlashAttention, section 3.3, https://arxiv.org/abs/2205.14135. Packed documents need no more
than where each begins and ends.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, check_device, check_shape, define_op

TILE = 64
EMPTY, FULL, PARTIAL = range(3)  # kinds of tiles


class MaskTiles(NamedTuple):
    """A mask as `mask_tiles` gives it.

    Args:
        kinds (Tensor): uint8 of shape ``[b or 1, h or 1, ceil(s / 64), ceil(s_kv / 64)]``: 0 where
            a tile of 64 x 64 hides everything, 1 where it shows everything, 2 elsewhere.
        bits (Tensor): int32 of shape ``[b or 1, h or 1, s, 2 * ceil(s_kv / 64)]``; bit ``j % 32``
            of word ``j // 32`` says whether key j is visible.
    """

    kinds: Tensor
    bits: Tensor


def mask_tiles(mask: Tensor) -> MaskTiles:
    """The packed form of a dense mask; layers that share a mask should share this too.

    Args:
        mask (Tensor): bool of shape ``[b or 1, s, s_kv]`` or ``[b or 1, h or 1, s, s_kv]``, True
            where a query may attend to a key; any strides.

    Returns:
        MaskTiles: an eighth of the memory of ``mask``.

    Raises:
        TypeError: if ``mask`` is not bool.
        ValueError: if ``mask`` has not 3 or 4 dimensions.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask_tiles: mask must be bool (True attends), got {mask.dtype}")
    if mask.ndim not in (3, 4):
        raise ValueError(
            f"mask_tiles: mask must have shape [b, s, s_kv] or [b, h, s, s_kv], got "
            f"{list(mask.shape)}"
        )
    return MaskTiles(*call("mask_tiles", mask.unsqueeze(1) if mask.ndim == 3 else mask))


def document_bounds(document_ids: Tensor) -> Tensor:
    """Where the document of each token begins and ends, for `attention`.

    Args:
        document_ids (Tensor): integers of shape ``[b, s]`` which tell documents packed into one row
            apart, and never decrease along it.

    Returns:
        Tensor: int32 of shape ``[2, b, s]``: the first token of the same document, and the first
        one after it.
    """
    ids = document_ids.contiguous()
    return torch.stack(
        [torch.searchsorted(ids, ids, right=right, out_int32=True) for right in (False, True)]
    )


def check_mask(
    op: str, mask: Tensor | MaskTiles | None, q: Tensor, s_kv: int
) -> tuple[Tensor | None, Tensor | None]:
    """A mask as an op takes it, or raises.

    Returns:
        tuple[Tensor | None, Tensor | None]: the bool mask ``[b or 1, h or 1, s, s_kv]`` and None,
        or the bits and kinds of a MaskTiles.
    """
    if mask is None:
        return None, None
    b, h, s, _ = q.shape
    if isinstance(mask, MaskTiles):
        kinds, bits = mask
        check_device(op, "mask", bits, "q", q)
        rows, columns = ((n + TILE - 1) // TILE for n in (s, s_kv))
        leading = tuple(n if n == 1 else m for n, m in zip(bits.shape[:2], (b, h), strict=True))
        check_shape(op, "the bits of mask", bits, (*leading, s, 2 * columns))
        check_shape(op, "the kinds of mask", kinds, (*leading, rows, columns))
        return bits, kinds
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool (True attends), got {mask.dtype}")
    check_device(op, "mask", mask, "q", q)
    full = mask.unsqueeze(1) if mask.ndim == 3 else mask
    if (
        full.ndim != 4
        or full.shape[0] not in (1, b)
        or full.shape[1] not in (1, h)
        or full.shape[2:] != (s, s_kv)
    ):
        raise ValueError(
            f"{op}: mask must have shape [{b} or 1, {s}, {s_kv}] or "
            f"[{b} or 1, {h} or 1, {s}, {s_kv}], got {list(mask.shape)}"
        )
    return full, None


def check_window(op: str, window: int | None, s_kv: int) -> int | None:
    """The window, None where it hides nothing, or raises."""
    if window is None:
        return None
    if window < 1:
        raise ValueError(f"{op}: window must be at least 1, got {window}")
    return window if window < s_kv else None


def check_documents(op: str, documents: Tensor | None, q: Tensor) -> None:
    """Raises unless the documents are None or as `document_bounds` gives them."""
    if documents is None:
        return
    if documents.dtype != torch.int32:
        raise TypeError(
            f"{op}: documents must be int32, got {documents.dtype}; see document_bounds"
        )
    check_shape(op, "documents", documents, (2, q.shape[0], q.shape[2]))
    check_device(op, "documents", documents, "q", q)


def dense_mask(mask: Tensor | None, kinds: Tensor | None, s_kv: int) -> Tensor | None:
    """The bool mask ``[b or 1, h or 1, s, s_kv]`` that an op was given, as such or as bits."""
    if kinds is None:
        return mask
    shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
    return (mask.unsqueeze(-1) >> shifts & 1).bool().flatten(-2)[..., :s_kv]


def visible(
    s: int,
    s_kv: int,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
    documents: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """All that hides keys as one bool tensor which broadcasts to ``[b, h, s, s_kv]``, or None."""
    keys = torch.arange(s_kv, device=device)
    if documents is not None:
        start, end = documents[:, :, None, :, None]
        same = (keys >= start) & (keys < end)
        mask = same if mask is None else mask & same
    if not causal and window is None:
        return mask
    distance = torch.arange(s_kv - s, s_kv, device=device).unsqueeze(1) - keys
    if not causal:
        band = distance < window
    elif window is None:
        band = distance >= 0
    else:
        band = (distance >= 0) & (distance < window)
    return band[None, None] if mask is None else mask & band


@define_op("mask_tiles(Tensor mask) -> (Tensor kinds, Tensor bits)")
def _reference(mask):
    s, s_kv = mask.shape[2:]
    padded = F.pad(mask, (0, -s_kv % TILE, 0, -s % TILE))
    words = padded[:, :, :s].unflatten(-1, (-1, 32)).long()
    bits = (words << torch.arange(32, device=mask.device)).sum(-1).to(torch.int32)

    seen = padded.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE)).sum((3, 5))
    rows, columns = (_tile_sizes(n, mask.device) for n in (s, s_kv))
    kinds = torch.full_like(seen, PARTIAL, dtype=torch.uint8)
    kinds.masked_fill_(seen == rows.unsqueeze(1) * columns, FULL).masked_fill_(seen == 0, EMPTY)
    return kinds, bits


def _tile_sizes(n, device):
    """How many of ``n`` rows or columns lie in each tile."""
    return (n - torch.arange(0, n, TILE, device=device)).clamp(max=TILE)


@torch.library.register_fake("torchtune_fused::mask_tiles", lib=LIBRARY)
def _(mask):
    b, h, s, s_kv = mask.shape
    columns = (s_kv + TILE - 1) // TILE
    kinds = mask.new_empty(b, h, (s + TILE - 1) // TILE, columns, dtype=torch.uint8)
    return kinds, mask.new_empty(b, h, s, 2 * columns, dtype=torch.int32)
