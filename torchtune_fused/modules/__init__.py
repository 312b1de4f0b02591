"""Modules on the fused ops: drop-ins for torchtune's, its losses, and two that stand alone."""

from torchtune_fused.modules.attention import FusedAttention
from torchtune_fused.modules.decoder import FusedTransformerDecoder
from torchtune_fused.modules.feed_forward import FusedFeedForward
from torchtune_fused.modules.lora_linear import FusedLoRALinear
from torchtune_fused.modules.loss import CEWithChunkedOutputLoss, LinearCrossEntropyLoss
from torchtune_fused.modules.mlp import MultiLayerPerceptron, MultiLayerPreceptron
from torchtune_fused.modules.optimized_attention import OptimizedAttention
from torchtune_fused.modules.rms_norm import FusedGemmaRMSNorm, FusedRMSNorm
from torchtune_fused.modules.transformer_layer import FusedTransformerSelfAttentionLayer

__all__ = [
    "CEWithChunkedOutputLoss",
    "FusedAttention",
    "FusedFeedForward",
    "FusedGemmaRMSNorm",
    "FusedLoRALinear",
    "FusedRMSNorm",
    "FusedTransformerDecoder",
    "FusedTransformerSelfAttentionLayer",
    "LinearCrossEntropyLoss",
    "MultiLayerPerceptron",
    "MultiLayerPreceptron",
    "OptimizedAttention",
]
