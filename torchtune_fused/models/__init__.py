"""Model families: from the config of a checkpoint to a decoder with the right structure."""

from torchtune_fused.models.builder import build_decoder
from torchtune_fused.models.config import FAMILIES, ModelConfig, load_model_config
from torchtune_fused.models.family import ConfigError, Family, UnsupportedModelError

__all__ = [
    "FAMILIES",
    "ConfigError",
    "Family",
    "ModelConfig",
    "UnsupportedModelError",
    "build_decoder",
    "load_model_config",
]
