"""torchtune's RMSNorm on the fused op."""

from torch import Tensor
from torchtune.modules import RMSNorm

from torchtune_fused.modules._plain import is_plain_tensor, share_state
from torchtune_fused.ops import rms_norm


class FusedRMSNorm(RMSNorm):
    """Drop-in for :class:`torchtune.modules.RMSNorm`: same constructor, state dict and results."""

    @classmethod
    def from_stock(cls, module: RMSNorm) -> "FusedRMSNorm":
        """The same norm, sharing all of its state with ``module``."""
        return share_state(module, RMSNorm, cls)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``.

        Args:
            x (Tensor): input of shape ``[..., dim]``.

        Returns:
            Tensor: shape and dtype of ``x``.
        """
        scale = self.scale
        if is_plain_tensor(x) and is_plain_tensor(scale):
            return rms_norm(x, scale, self.eps)
        return super().forward(x)
