"""The builders for torchtune's own modules."""

from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import DoRALinear, LoRALinear

from torchtune_fused.modules import (
    FusedAttention,
    FusedFeedForward,
    FusedGemmaRMSNorm,
    FusedLoRALinear,
    FusedRMSNorm,
    FusedTransformerDecoder,
    FusedTransformerSelfAttentionLayer,
)
from torchtune_fused.modules.feed_forward import activation_name
from torchtune_fused.surgery.registry import Decline, register_builder


@register_builder(MultiHeadAttention)
def build_attention(module: MultiHeadAttention) -> nn.Module:
    """Attention of any kind; its rotary embeddings run as part of it."""
    return FusedAttention.from_stock(module)


@register_builder(FeedForward)
def build_feed_forward(module: FeedForward) -> nn.Module | Decline:
    """Gated feed-forwards with an activation that the op knows."""
    if module.w3 is None:
        return Decline("it has no up projection, and only gated feed-forwards are fused")
    if activation_name(module.activation) is None:
        return Decline(f"its activation is {module.activation}, not a plain SiLU, GELU or ReLU")
    return FusedFeedForward.from_stock(module)


@register_builder(LoRALinear)
def build_lora_linear(module: LoRALinear) -> nn.Module | Decline:
    """Linear layers with an adapter, wherever they stand."""
    if module._quantize_base:
        return Decline("its weight is quantised, and the fused adapter takes 16-bit weights")
    return FusedLoRALinear.from_stock(module)


@register_builder(DoRALinear)
def build_dora_linear(module: DoRALinear) -> Decline:
    """None: named in the report, so that nobody takes it for fused."""
    return Decline("DoRA scales each row by a norm of the merged weight, which no kernel does yet")


@register_builder(RMSNorm)
def build_rms_norm(module: RMSNorm) -> nn.Module:
    """Every RMSNorm, those of queries and keys included."""
    return FusedRMSNorm.from_stock(module)


@register_builder(GemmaRMSNorm)
def build_gemma_rms_norm(module: GemmaRMSNorm) -> nn.Module:
    """The norm of Gemma, which scales by one more than its parameter."""
    return FusedGemmaRMSNorm.from_stock(module)


@register_builder(TransformerSelfAttentionLayer)
def build_layer(module: TransformerSelfAttentionLayer) -> nn.Module | Decline:
    """Layers with a norm that the additions to the residual stream can be fused with."""
    norms = type(module.sa_norm), type(module.mlp_norm)
    if not any(issubclass(norm, (RMSNorm, GemmaRMSNorm)) for norm in norms):
        names = " and ".join(sorted({norm.__name__ for norm in norms}))
        return Decline(f"its norms are {names}, and additions are fused with RMSNorms only")
    return FusedTransformerSelfAttentionLayer.from_stock(module)


@register_builder(TransformerDecoder)
def build_decoder(module: TransformerDecoder) -> nn.Module:
    """The decoder around them, whose decoding steps become CUDA graphs."""
    return FusedTransformerDecoder.from_stock(module)
