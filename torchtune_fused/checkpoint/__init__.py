"""Checkpoints: transformers' safetensors and Meta's .pth, read lazily, written back bit for bit."""

from torchtune_fused.checkpoint.adapter import WeightAdapter
from torchtune_fused.checkpoint.files import CheckpointError
from torchtune_fused.checkpoint.hub import HubError
from torchtune_fused.checkpoint.loader import load_model_weights_torchtune

__all__ = ["CheckpointError", "HubError", "WeightAdapter", "load_model_weights_torchtune"]
