"""The rotary embedding that a config asks for, and its tables once weights are loaded."""

from __future__ import annotations

import torch
from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

from torchtune_fused.models.config import FAMILIES, ModelConfig


def build_rope(config: ModelConfig, max_seq_len: int) -> nn.Module:
    """The rotary embedding of a model, its table ``max_seq_len`` long; one serves all layers.

    Source: RoFormer (Su et al., 2021, https://arxiv.org/abs/2104.09864); the scaling of Llama 3.1
    as in Meta's reference code; linear scaling as in position interpolation (Chen et al., 2023,
    https://arxiv.org/abs/2306.15595).
    """
    size = {"dim": config.head_dim, "max_seq_len": max_seq_len, "base": config.rope_base}
    if not FAMILIES[config.family].interleaved_rope:
        return Qwen2RotaryPositionalEmbeddings(**size)
    scaling = config.rope_scaling
    if scaling is None:
        return RotaryPositionalEmbeddings(**size)
    if scaling["rope_type"] == "linear":
        # Llama 3's scaling divides by the factor each frequency whose wavelength exceeds the old
        # context. No wavelength is below 2π, so with a context of 1 it divides them all.
        return Llama3ScaledRoPE(**size, scale_factor=scaling["factor"], old_context_len=1)
    return Llama3ScaledRoPE(
        **size,
        scale_factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        old_context_len=scaling["original_max_position_embeddings"],
    )


def init_rope(model: nn.Module, device: torch.device) -> None:
    """Fill the RoPE tables of a model that was built on the meta device.

    They are computed on the CPU and then moved, so that shards on different devices rotate alike
    to the last bit.
    """
    for module in model.modules():
        if hasattr(module, "rope_init"):
            with torch.device("cpu"):
                module.rope_init()
            module.to(device)
