"""torchtune's MultiHeadAttention on the fused ops."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune.modules import KVCache, MultiHeadAttention

from torchtune_fused.modules._plain import in_autocast, share_state
from torchtune_fused.modules.block_mask import dense_mask, mask_arguments, tiles_of
from torchtune_fused.modules.lora_linear import qkv_layers
from torchtune_fused.modules.rms_norm import head_norms
from torchtune_fused.modules.rope import rope_tables, rotation
from torchtune_fused.ops import (
    attention,
    attention_decode,
    kv_cache_update,
    qk_norm_rope,
    qk_norm_rope_append,
    qkv_linear,
    rotary_self_attention,
)
from torchtune_fused.ops.attention import has_kernel
from torchtune_fused.ops.attention_decode import FEW_QUERIES, visible_slots
from torchtune_fused.ops.attention_mask import visible


class FusedAttention(MultiHeadAttention):
    """Drop-in for :class:`torchtune.modules.MultiHeadAttention`: same state dict and results.

    Args:
        sliding_window (int | None): how many tokens a token sees at most, itself included, in
            self-attention, on top of any mask (Mistral). Default: all.
        norm_before_rope (bool): whether ``q_norm`` and ``k_norm`` come before the rotary embedding
            (Qwen3) instead of after it.
        **kwargs: those of :class:`torchtune.modules.MultiHeadAttention`.

    Raises:
        ValueError: if ``sliding_window < 1``, or as torchtune's class.
    """

    # As class attributes too: a view of a stock module has neither in its state.
    sliding_window: int | None = None
    norm_before_rope: bool = False
    compute_dtype: torch.dtype | None = None  # set by patch_model, where callers use another

    def __init__(
        self, *, sliding_window: int | None = None, norm_before_rope: bool = False, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        if sliding_window is not None and sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")
        self.sliding_window = sliding_window
        self.norm_before_rope = norm_before_rope

    @classmethod
    def from_stock(cls, module: MultiHeadAttention) -> "FusedAttention":
        """The same attention, sharing all of its state with ``module``."""
        return share_state(module, MultiHeadAttention, cls)

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """As torchtune's; with a ``compute_dtype``, the cache has that dtype."""
        super().setup_cache(batch_size, self.compute_dtype or dtype, max_seq_len)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Tensor | BlockMask | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``x`` to ``y``, or to the KV cache.

        Args:
            x (Tensor): input of the queries, ``[b, s, embed_dim]``.
            y (Tensor | None): input of the keys and values, ``[b, s_kv, embed_dim]``: ``x`` itself
                in self-attention. None attends to what the KV cache holds.
            mask (Tensor | BlockMask | None): bool of shape ``[b or 1, s, s_kv]``, True attends,
                where ``s_kv`` is the length of the cache if one is enabled; or a BlockMask. None is
                causal if ``is_causal``, and with an enabled cache, as torchtune never calls it,
                causal over the slots filled.
            input_pos (Tensor | None): positions of the tokens, ``[s]`` or ``[b, s]``. Default: 0,
                1, … s - 1.

        Returns:
            Tensor: shape ``[b, s, embed_dim]``.

        Raises:
            ValueError: if there is neither ``y`` nor an enabled cache, the cache is full, or the
                sequence is longer than the rotary embedding's cache.
        """
        dtype = self.compute_dtype
        if dtype is not None and x.dtype != dtype:
            inner = x.to(dtype)
            other = inner if y is x else None if y is None else y.to(dtype)
            return self.forward(inner, other, mask=mask, input_pos=input_pos).to(x.dtype)
        cache = self.kv_cache
        caching = cache is not None and self.cache_enabled
        causal = cache is None and mask is None and self.is_causal
        window = self.sliding_window if y is x else None
        if isinstance(mask, BlockMask) and (caching or not x.is_cuda):
            mask = dense_mask(mask)

        if y is None:
            if not caching:
                raise ValueError("attention needs y, or an enabled KV cache to attend to")
            q = self._place(self._split_heads(self.q_proj(x)), self.q_norm, input_pos)
            k, v = cache.k_cache, cache.v_cache
        else:
            if y is x and not caching and torch.is_grad_enabled():
                out = self._attend_from_input(x, input_pos, mask, causal, window)
                if out is not None:
                    return self.output_proj(out)
            q, k, v = (self._split_heads(t) for t in self._project(x, y))
            if caching and y is x and self._can_decode(cache, q, k, v, mask):
                q = self._append(cache, q, k, v, input_pos)
                return self._merge_heads(self._decode(cache, q, mask))
            (q, k), v = self._place_both(q, k, input_pos), v.transpose(1, 2)
            if caching:
                k, v = cache.update(k, v)
                if y is x:
                    mask, window = self._mask_of_slots(cache, q, mask), None
        return self._merge_heads(self._attend(q, k, v, mask, causal, window))

    def _attend_from_input(
        self,
        x: Tensor,
        input_pos: Tensor | None,
        mask: Tensor | BlockMask | None,
        causal: bool,
        window: int | None,
    ) -> Tensor | None:
        """Self-attention before its output projection: as one op, where that comes to the same."""
        tables = rope_tables(self.pos_embeddings)
        if tables is None or 2 * tables[0].shape[1] != self.head_dim or self.q_norm is not None:
            return None
        hidden = self._hidden(x, mask, causal, window)
        if hidden is None:
            return None
        projections = qkv_layers(x, self.q_proj, self.k_proj, self.v_proj)
        if projections is None:
            return None
        layers, options = projections
        cos, sin, options["interleaved"] = tables
        return rotary_self_attention(x, *layers, cos, sin, input_pos, **hidden, **options)

    def _project(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of ``x``, keys and values of ``y``: as one op, where gradients gain by it."""
        projections = self.q_proj, self.k_proj, self.v_proj
        fused = qkv_layers(x, *projections) if y is x and torch.is_grad_enabled() else None
        if fused is not None:
            layers, options = fused
            return qkv_linear(x, *layers, **options)
        return tuple(module(t) for module, t in zip(projections, (x, y, y), strict=True))

    def _split_heads(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        return x.view(b, s, -1, self.head_dim)

    def _place_both(self, q: Tensor, k: Tensor, input_pos: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_place` of queries and keys: as one op, where that comes to the same."""
        fused = self._rotation_as_op(q, k)
        if fused is None:
            return self._place(q, self.q_norm, input_pos), self._place(k, self.k_norm, input_pos)
        angles, options = fused
        q, k = qk_norm_rope(q, k, *angles, input_pos, **options)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _append(
        self, cache: KVCache, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor | None
    ) -> Tensor:
        """`_place` of queries, and of keys on their way into the cache, as `_place_both`."""
        buffers = cache.k_cache, cache.v_cache, cache.cache_pos
        fused = self._rotation_as_op(q, k)
        if fused is None:
            kv_cache_update(*buffers, self._place(k, self.k_norm, input_pos), v.transpose(1, 2))
            return self._place(q, self.q_norm, input_pos)
        angles, options = fused
        return qk_norm_rope_append(q, k, v, *buffers, *angles, input_pos, **options).transpose(1, 2)

    def _rotation_as_op(self, q: Tensor, k: Tensor) -> tuple[tuple[Tensor, Tensor], dict] | None:
        """The angles and the options by which `qk_norm_rope` does what `_place` would; or None."""
        tables, norms = rope_tables(self.pos_embeddings), (None, 0.0)
        if tables is None or q.shape[1] != k.shape[1]:
            return None
        if self.q_norm is not None:
            norms = head_norms(self.q_norm, self.k_norm)
            if norms is None or in_autocast(q):
                return None
        cos, sin, interleaved = tables
        return (cos, sin), {
            "interleaved": interleaved,
            "head_norms": norms[0],
            "eps": norms[1],
            "norm_before_rope": self.norm_before_rope,
        }

    def _place(self, x: Tensor, norm: nn.Module | None, input_pos: Tensor | None) -> Tensor:
        """Heads ``[b, s, h, d]`` as attention reads them: ``[b, h, s, d]``, normed and rotated."""
        if norm is not None and self.norm_before_rope:
            x = norm(x)
        if self.pos_embeddings is not None:
            x = rotation(self.pos_embeddings)(x, input_pos=input_pos)
        x = x.transpose(1, 2)
        if norm is not None and not self.norm_before_rope:
            x = norm(x)
        return x

    def _merge_heads(self, x: Tensor) -> Tensor:
        b, h, s, d = x.shape
        return self.output_proj(x.transpose(1, 2).reshape(b, s, h * d))

    def _can_decode(
        self, cache: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> bool:
        """Whether the ops for the KV cache apply: not to gradients, dropout or a cache unknown."""
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for t in (q, k, v, *self.parameters())
        )
        return (
            type(cache) is KVCache
            and (self.is_causal if mask is None else _is_bool(mask))
            and not (needs_grad or self._dropout or in_autocast(q))
        )

    def _decode(self, cache: KVCache, q: Tensor, mask: Tensor | None) -> Tensor:
        """Self-attention over the updated KV cache, reading no more of it than is filled."""
        k_cache, v_cache, length = cache.k_cache, cache.v_cache, cache.cache_pos[:1]
        if mask is not None and q.shape[2] > FEW_QUERIES and has_kernel(q, q.shape[-1]):
            mask = tiles_of(mask)
        return attention_decode(q, k_cache, v_cache, length, mask, window=self.sliding_window)

    def _mask_of_slots(self, cache: nn.Module, q: Tensor, mask: Tensor | None) -> Tensor | None:
        """``mask`` with what `_decode` would hide too, over all slots of the updated KV cache."""
        causal = mask is None and self.is_causal
        if not causal and self.sliding_window is None:
            return mask
        length, max_len = cache.cache_pos[:1], cache.k_cache.shape[2]
        seen = visible_slots(length, q.shape[2], max_len, causal, self.sliding_window)
        return _restrict(mask, seen)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | BlockMask | None,
        causal: bool,
        window: int | None,
    ) -> Tensor:
        """Attention over all of ``k`` and ``v``: on the op, or on PyTorch for what it can't do."""
        s, s_kv, dropout = q.shape[2], k.shape[2], self._dropout
        if causal and s != s_kv:
            # Here torchtune lets the first query, not the last, stand at its key.
            mask, causal = q.new_ones(1, s, s_kv, dtype=torch.bool).tril(), False
        hidden = self._hidden(q, mask, causal, window)
        if hidden is not None:
            return attention(q, k, v, **hidden)
        if window is not None and window < s_kv:
            seen = visible(s, s_kv, None, causal, window, None, q.device)
            mask, causal = _restrict(mask, seen), False
        groups = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if isinstance(mask, BlockMask):
            return self._attention_call(q, k, v, mask=mask, dropout_p=dropout, is_causal=False)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=_per_head(mask), dropout_p=dropout, is_causal=causal
        )

    def _hidden(
        self, like: Tensor, mask: Tensor | BlockMask | None, causal: bool, window: int | None
    ) -> dict[str, Any] | None:
        """What hides keys, as arguments of `attention`; None where that op can't stand in."""
        if self._dropout or in_autocast(like):
            return None
        if mask is None or (_is_bool(mask) and not has_kernel(like, self.head_dim)):
            return {"mask": mask, "causal": causal, "window": window}
        if has_kernel(like, self.head_dim) and (_is_bool(mask) or isinstance(mask, BlockMask)):
            return {**mask_arguments(mask), "window": window}
        return None

    @property
    def _dropout(self) -> float:
        return self.attn_dropout if self.training else 0.0


def _is_bool(mask: Tensor | BlockMask) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool


def _per_head(mask: Tensor | None) -> Tensor | None:
    """A mask with a dimension for the heads, ``[b or 1, h or 1, s, s_kv]``."""
    return mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask


def _restrict(mask: Tensor | BlockMask | None, seen: Tensor) -> Tensor:
    """A mask of any kind, with all hidden that ``seen`` doesn't show."""
    if mask is None:
        return seen
    mask = _per_head(dense_mask(mask) if isinstance(mask, BlockMask) else mask)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
