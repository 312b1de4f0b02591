"""Fused operators: functional, registered with ``torch.library``, usable in any PyTorch program.

Each has a reference in plain PyTorch, a fake for tracing and, where it makes sense, a gradient.
"""

from torchtune_fused.ops.adamw import adamw_
from torchtune_fused.ops.adapters import AdaptedLinear
from torchtune_fused.ops.add_rms_norm import add_rms_norm
from torchtune_fused.ops.attention import attention, fused_attention
from torchtune_fused.ops.attention_decode import attention_decode
from torchtune_fused.ops.attention_mask import MaskTiles, document_bounds, mask_tiles
from torchtune_fused.ops.decode_attend import decode_attend
from torchtune_fused.ops.decode_embed import decode_embed_
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import decode_linear
from torchtune_fused.ops.decode_qkv import decode_qkv
from torchtune_fused.ops.decode_sample import decode_sample
from torchtune_fused.ops.gated_mlp import fused_mlp, gated_mlp
from torchtune_fused.ops.kv_cache_update import kv_cache_update
from torchtune_fused.ops.linear_cross_entropy import linear_cross_entropy
from torchtune_fused.ops.lora_gated_mlp import lora_gated_mlp
from torchtune_fused.ops.lora_linear import lora_linear
from torchtune_fused.ops.qk_norm_rope import qk_norm_rope
from torchtune_fused.ops.qk_norm_rope_append import qk_norm_rope_append
from torchtune_fused.ops.qkv_linear import qkv_linear
from torchtune_fused.ops.rms_norm import rms_norm
from torchtune_fused.ops.rope import rope
from torchtune_fused.ops.rotary_self_attention import rotary_self_attention
from torchtune_fused.ops.tied_embedding import tied_embedding

__all__ = [
    "AdaptedLinear",
    "MaskTiles",
    "adamw_",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "decode_attend",
    "decode_embed_",
    "decode_gated",
    "decode_linear",
    "decode_qkv",
    "decode_sample",
    "document_bounds",
    "fused_attention",
    "fused_mlp",
    "gated_mlp",
    "kv_cache_update",
    "linear_cross_entropy",
    "lora_gated_mlp",
    "lora_linear",
    "mask_tiles",
    "qk_norm_rope",
    "qk_norm_rope_append",
    "qkv_linear",
    "rms_norm",
    "rope",
    "rotary_self_attention",
    "tied_embedding",
]
