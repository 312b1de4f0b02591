"""Model surgery: fused modules in place of torchtune's, inside a model that exists already."""

from torchtune_fused.surgery import builders  # noqa: F401  registers torchtune's own modules
from torchtune_fused.surgery.component import fused_model
from torchtune_fused.surgery.patch import PatchReport, patch_model, unpatch_model
from torchtune_fused.surgery.registry import Decline, register_builder

__all__ = [
    "Decline",
    "PatchReport",
    "fused_model",
    "patch_model",
    "register_builder",
    "unpatch_model",
]
