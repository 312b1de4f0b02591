"""Qwen3: Qwen2 without biases, with an RMSNorm over each head of q and k before RoPE."""

from typing import Any

from torchtune_fused.models.family import DECODER_WEIGHTS, Family, Fields
from torchtune_fused.models.qwen2 import window_per_layer


def _read(fields: Fields) -> dict[str, Any]:
    attention_bias = fields.flag("attention_bias", False)
    return {
        # Qwen3's heads are 128 wide whatever the width of the model is.
        "head_dim": fields.integer("head_dim", 128),
        "attn_bias": attention_bias,
        "attn_output_bias": attention_bias,
        "qk_norm": True,
        "sliding_windows": window_per_layer(fields),
    }


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    interleaved_rope=False,
    rope_types=("default",),
    weights={
        **DECODER_WEIGHTS,
        "model.layers.{layer}.self_attn.q_norm.weight": "layers.{layer}.attn.q_norm.scale",
        "model.layers.{layer}.self_attn.k_norm.weight": "layers.{layer}.attn.k_norm.scale",
    },
    read=_read,
)
