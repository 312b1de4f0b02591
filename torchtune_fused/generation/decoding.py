"""One model over its KV cache: prefill a prompt, then step token by token."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchtune.modules import KVCache, TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

from torchtune_fused.modules.decoder import CapturedSteps
from torchtune_fused.shard import ShardTransformerDecoder
from torchtune_fused.shard.pipeline import Pipeline


class CachedDecoder:
    """Next-token logits of a model whose KV caches are set up and empty.

    Nothing here waits for the device: how many tokens the caches hold is counted on the host.

    Args:
        model (TransformerDecoder | Pipeline): A whole model.
        padding (Tensor): int64 ``[b]``: leading slots of each row that hold padding.
        cache_len (int): Slots of the KV caches.
    """

    def __init__(
        self, model: TransformerDecoder | Pipeline, padding: Tensor, cache_len: int
    ) -> None:
        self._model = model
        self._padded = bool(padding.any())
        # Without padding all rows share one mask and one set of positions.
        self._padding = (padding if self._padded else padding[:1])[:, None]  # [b or 1, 1]
        self._slots = torch.arange(cache_len, device=padding.device)
        self._real = self._slots >= self._padding  # [b or 1, cache_len]
        self._length = 0

    def prefill(self, tokens: Tensor) -> Tensor | None:
        """Fill the caches with the prompts.

        Args:
            tokens (Tensor): int64 ``[b, s]``, padded on the left.

        Returns:
            Tensor | None: float logits ``[b, vocab]`` of the last position, the only one that is
            projected; None on a pipeline's ranks before the last.
        """
        queries = self._slots[: tokens.shape[1], None]
        self._length = tokens.shape[1]
        # Padding attends to itself: a row without any key would have no softmax.
        mask = (self._slots <= queries) & self._real[:, None] | (self._slots == queries)
        return self._last_logits(tokens, mask, self._positions(queries.T))

    def step(self, tokens: Tensor) -> Tensor | None:
        """Append one token to each row.

        Args:
            tokens (Tensor): int64 ``[b]``.

        Returns:
            Tensor | None: float logits ``[b, vocab]``, as from :meth:`prefill`, which the next step
            may overwrite.
        """
        model, tokens, slot = self._model, tokens[:, None], self._length
        self._length += 1
        if isinstance(model, CapturedSteps):
            # Without padding, a captured step sees from the caches where it stands.
            logits = model.step(tokens, *(self._place(slot) if self._padded else (None, None)))
            if logits is not None:
                return logits[:, 0]
        if isinstance(model, Pipeline):
            return _last(model.step(tokens, *self._place(slot)))
        return self._last_logits(tokens, *self._place(slot))

    def _place(self, slot: int) -> tuple[Tensor, Tensor]:
        """Mask and position of one token a row."""
        mask = (self._real & (self._slots <= slot))[:, None]
        return mask, self._positions(self._slots[slot : slot + 1])

    def _positions(self, slots: Tensor) -> Tensor:
        """Positions of slots in their row: a row starts at its first real token."""
        return (slots - self._padding).clamp_min(0)

    def _last_logits(self, tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor | None:
        model = self._model
        if isinstance(model, (ShardTransformerDecoder, Pipeline)):
            h = model.forward_hidden(tokens, mask=mask, input_pos=input_pos)
            if h is None:
                return None
        else:
            h = model.tok_embeddings(tokens)
            for layer in model.layers:
                h = layer(h, mask=mask, input_pos=input_pos)
        return _last(model.unembed(h[:, -1:]))


def _last(logits: Tensor | list[Tensor] | None) -> Tensor | None:
    """Logits of the only position."""
    if isinstance(logits, list):  # a model that a training recipe told to chunk its output
        logits = torch.cat(logits, 1).float()
    return None if logits is None else logits[:, 0]


def check_caches(decoder: TransformerDecoder, batch_size: int, cache_len: int) -> None:
    """Check that KV caches can be made, or that those that the caller has set up suffice.

    Raises:
        ValueError: If the decoder's own caches are disabled, too small, or of another batch size.
    """
    if not decoder.caches_are_setup():
        return
    if not decoder.caches_are_enabled():
        raise ValueError("the model's KV caches are disabled: generate outside disable_kv_cache")
    for cache in _caches(decoder):
        rows, _, slots, _ = cache.k_cache.shape
        if rows < batch_size or slots < cache_len:
            raise ValueError(
                f"cache too small: the model's KV caches hold {rows} rows of {slots} tokens, this "
                f"call needs {batch_size} of {cache_len}; delete_kv_caches(model) lets the call "
                "make its own"
            )
        if rows != batch_size:
            raise ValueError(
                f"the model's KV caches were set up for a batch of {rows}, this call has "
                f"{batch_size}; delete_kv_caches(model) lets the call make its own"
            )


@contextmanager
def empty_caches(decoder: TransformerDecoder, batch_size: int, cache_len: int) -> Iterator[int]:
    """Lend the decoder empty KV caches, or empty its own.

    Yields:
        int: the number of slots in the caches, at least ``cache_len``.
    """
    if decoder.caches_are_setup():
        decoder.reset_caches()
        yield min(cache.k_cache.shape[2] for cache in _caches(decoder))
        return
    parameter = next(decoder.parameters())
    with local_kv_cache(
        decoder,
        batch_size=batch_size,
        device=parameter.device,
        dtype=parameter.dtype,
        decoder_max_seq_len=cache_len,
    ):
        yield cache_len


def _caches(decoder: TransformerDecoder) -> Iterator[KVCache]:
    return (module for module in decoder.modules() if isinstance(module, KVCache))
