"""Checks on a decoder's inputs: what would fail deep inside a layer, or go wrong silently.

Shapes are always checked. Values are looked at where that is free: on a GPU it would wait for all
work queued before, and while tracing there are none.
"""

import torch
from torch import Tensor
from torchtune.modules import KVCache


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Tokens are ``[b, s]``, integers, not empty, and in the vocabulary."""
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens has shape {list(tokens.shape)} and dtype {tokens.dtype}, expected [b, s] of "
            "int64 or int32"
        )
    if 0 in tokens.shape:
        raise ValueError(f"tokens has shape {list(tokens.shape)}: the prompt is empty")
    if _values_can_be_read(tokens):
        low, high = (value.item() for value in tokens.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"token {low if low < 0 else high} is outside of the vocabulary of {vocab_size}"
            )


def check_cache(cache: KVCache, batch: int, seq_len: int) -> None:
    """The cache has rows for the batch and free slots for the tokens."""
    rows, _, slots, _ = cache.k_cache.shape
    if batch > rows:
        raise ValueError(
            f"a batch of {batch} does not fit the KV cache, which was set up for {rows}"
        )
    used = cache.size if _values_can_be_read(cache.cache_pos) else 0
    if used + seq_len > slots:
        raise ValueError(
            f"{seq_len} more tokens do not fit the KV cache, which holds {used} of at most {slots}:"
            " set up caches with a larger decoder_max_seq_len, or reset them"
        )


def check_mask(mask: Tensor, batch: int, seq_len: int, keys: int) -> None:
    """The mask is ``[b or 1, s, keys]``."""
    if mask.ndim != 3 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (seq_len, keys):
        raise ValueError(
            f"mask has shape {list(mask.shape)}, expected [{batch} or 1, {seq_len}, {keys}]"
        )


def check_positions(input_pos: Tensor, batch: int, seq_len: int, max_seq_len: int) -> None:
    """The positions are ``[s]`` or ``[b, s]``, and RoPE's tables reach them."""
    # torchtune's generate passes [b] when s is 1, and [s] or [b, s] otherwise.
    if input_pos.numel() not in (seq_len, batch * seq_len):
        raise ValueError(
            f"input_pos has shape {list(input_pos.shape)}, expected [{seq_len}] or "
            f"[{batch}, {seq_len}]"
        )
    if _values_can_be_read(input_pos):
        low, high = (value.item() for value in input_pos.aminmax())
        if low < 0 or high >= max_seq_len:
            raise ValueError(
                f"input_pos holds {low if low < 0 else high}, outside of 0 to {max_seq_len - 1}, "
                "the positions that max_seq_len leaves"
            )


def _values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
