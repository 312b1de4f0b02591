"""torchtune's RMSNorms on the fused ops."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor, nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm

from torchtune_fused.modules._plain import adds_to, is_plain, is_plain_tensor, share_state
from torchtune_fused.modules.recompute import recompute
from torchtune_fused.ops import add_rms_norm, rms_norm


class _OnOp(nn.Module):
    """The forward of both norms: the op, where it comes to the same as torchtune's."""

    _unit_offset = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of ``x``.

        Args:
            x (Tensor): input of shape ``[..., dim]``.

        Returns:
            Tensor: shape and dtype of ``x``.
        """
        scale = self.scale
        if is_plain_tensor(x) and is_plain_tensor(scale):
            return rms_norm(x, scale, self.eps, unit_offset=self._unit_offset)
        return super().forward(x)


class FusedRMSNorm(_OnOp, RMSNorm):
    """Drop-in for :class:`torchtune.modules.RMSNorm`: same constructor, state dict and results."""

    @classmethod
    def from_stock(cls, module: RMSNorm) -> "FusedRMSNorm":
        """The same norm, sharing all of its state with ``module``."""
        return share_state(module, RMSNorm, cls)


class FusedGemmaRMSNorm(_OnOp, GemmaRMSNorm):
    """Drop-in for torchtune's ``GemmaRMSNorm``, which scales by ``1 + scale``."""

    _unit_offset = True

    @classmethod
    def from_stock(cls, module: GemmaRMSNorm) -> "FusedGemmaRMSNorm":
        """The same norm, sharing all of its state with ``module``."""
        return share_state(module, GemmaRMSNorm, cls)


def add_norm(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, AbstractContextManager]:
    """``norm(x + residual)``, as one op where that comes to the same.

    Args:
        norm (nn.Module): any module.
        x (Tensor): input of shape ``[..., dim]``.
        residual (Tensor | None): what to add to it. Default: nothing.

    Returns:
        tuple[Tensor, Tensor, AbstractContextManager]: the normalised sum; the sum; and a context
        for the calls that read the former, in which it is not kept for the backward pass.
    """
    if not _can_add(norm, x, residual):
        total = x if residual is None else residual + x
        return norm(total), total, nullcontext()
    scale, eps, unit_offset = norm.scale, norm.eps, norm._unit_offset
    y, total = add_rms_norm(x, residual, scale, eps, unit_offset=unit_offset)
    again = partial(rms_norm, eps=eps, unit_offset=unit_offset)
    return y, total, recompute(y, again, total, scale)


def _can_add(norm: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """Whether nobody can tell `add_rms_norm` from an addition and a call of ``norm``."""
    if not any(is_plain(norm, cls) for cls in (FusedRMSNorm, FusedGemmaRMSNorm)):
        return False
    return is_plain_tensor(x) and (residual is None or adds_to(residual, x))


def head_norms(q_norm: nn.Module, k_norm: nn.Module) -> tuple[tuple[Tensor, Tensor], float] | None:
    """Scales and epsilon of the norms of queries and keys, None if they have to be called."""
    for cls in (FusedRMSNorm, RMSNorm):
        if is_plain(q_norm, cls) and is_plain(k_norm, cls) and q_norm.eps == k_norm.eps:
            return (q_norm.scale, k_norm.scale), q_norm.eps
    return None
