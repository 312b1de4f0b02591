"""build_decoder: a ModelConfig becomes a decoder of torchtune's modules."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerSelfAttentionLayer,
)

from torchtune_fused.models.config import ModelConfig
from torchtune_fused.models.rope import build_rope
from torchtune_fused.modules import FusedAttention
from torchtune_fused.shard.decoder import ShardTransformerDecoder
from torchtune_fused.shard.shard import Shard

_ACTIVATIONS = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


def build_decoder(
    config: ModelConfig, shard: Shard | None = None, *, max_seq_len: int | None = None
) -> ShardTransformerDecoder:
    """Build a model, or a shard of it, with fresh weights on the default device.

    Modules are torchtune's own wherever torchtune can express the model, so that ``patch_model``
    swaps them and any torchtune tool understands them. Attention with a sliding window or with
    norms before RoPE, which torchtune lacks, is a
    :class:`~torchtune_fused.modules.FusedAttention` from the start.

    Args:
        config (ModelConfig): The model.
        shard (Shard | None): The layers to build; None for all.
        max_seq_len (int | None): Longest sequence to run, in tokens: RoPE's tables are this long.
            None for the config's.

    Returns:
        ShardTransformerDecoder: The decoder. Its RoPE tables need
        :func:`~torchtune_fused.models.rope.init_rope` if it was built on the meta device.

    Raises:
        ValueError: If the shard is not one of this model, or ``max_seq_len`` is not positive.
    """
    shard = shard or Shard.whole(config.model_id, config.num_layers)
    shard = shard.of(config.num_layers)
    max_seq_len = config.max_seq_len if max_seq_len is None else max_seq_len
    if max_seq_len < 1:
        raise ValueError(f"max_seq_len is {max_seq_len}, expected at least 1")
    rope = build_rope(config, max_seq_len)
    norm = partial(RMSNorm, config.embed_dim, eps=config.norm_eps)
    first, last = shard.is_first_layer(), shard.is_last_layer()

    tok_embeddings = nn.Embedding(config.vocab_size, config.embed_dim) if first else None
    output = None
    if last and first and config.tie_word_embeddings:
        output = TiedLinear(tok_embeddings)
    elif last:
        output = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
    decoder = ShardTransformerDecoder(
        shard=shard,
        tok_embeddings=tok_embeddings,
        layers=[
            TransformerSelfAttentionLayer(
                attn=_build_attention(config, layer, rope, max_seq_len),
                mlp=_build_mlp(config),
                sa_norm=norm(),
                mlp_norm=norm(),
            )
            for layer in shard.layers
        ],
        max_seq_len=max_seq_len,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        norm=norm() if last else None,
        output=output,
    )
    decoder.config = config
    return decoder


def _build_attention(
    config: ModelConfig, layer: int, rope: nn.Module, max_seq_len: int
) -> MultiHeadAttention:
    q_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norm = partial(RMSNorm, config.head_dim, eps=config.norm_eps)
    window = config.sliding_windows[layer]
    attention = MultiHeadAttention
    if config.qk_norm or window is not None:
        attention = partial(FusedAttention, sliding_window=window, norm_before_rope=config.qk_norm)
    return attention(
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        q_proj=nn.Linear(config.embed_dim, q_dim, bias=config.attn_bias),
        k_proj=nn.Linear(config.embed_dim, kv_dim, bias=config.attn_bias),
        v_proj=nn.Linear(config.embed_dim, kv_dim, bias=config.attn_bias),
        output_proj=nn.Linear(q_dim, config.embed_dim, bias=config.attn_output_bias),
        pos_embeddings=rope,
        q_norm=head_norm() if config.qk_norm else None,
        k_norm=head_norm() if config.qk_norm else None,
        max_seq_len=max_seq_len,
        attn_dropout=config.attn_dropout,
    )


def _build_mlp(config: ModelConfig) -> FeedForward:
    up = partial(nn.Linear, config.embed_dim, config.intermediate_dim, bias=config.mlp_bias)
    return FeedForward(
        gate_proj=up(),
        down_proj=nn.Linear(config.intermediate_dim, config.embed_dim, bias=config.mlp_bias),
        up_proj=up(),
        activation=_ACTIVATIONS[config.hidden_act](),
    )
