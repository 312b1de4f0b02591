"""torchtune's FeedForward on the fused op."""

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward
from torchtune.modules.peft import LoRALinear

from torchtune_fused.modules._plain import (
    adds_to,
    in_autocast,
    is_plain,
    is_plain_tensor,
    plain_linear,
    share_state,
)
from torchtune_fused.modules.lora_linear import adapter_scale, plain_lora
from torchtune_fused.ops import gated_mlp, lora_gated_mlp

_ACTIVATIONS = {nn.SiLU: "silu", nn.ReLU: "relu"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_name(activation: nn.Module) -> str | None:
    """The name by which `gated_mlp` knows an activation module, None if it doesn't."""
    cls = type(activation)
    if not is_plain(activation, cls):
        return None
    return _GELUS[activation.approximate] if cls is nn.GELU else _ACTIVATIONS.get(cls)


def fuse(
    x: Tensor,
    gate: nn.Module,
    up: nn.Module,
    down: nn.Module,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`gated_mlp` of three linear layers, None if it wouldn't be the same as calling them."""
    gate, up, down = plain_linear(gate), plain_linear(up), plain_linear(down)
    if gate is None or up is None or down is None or not is_plain_tensor(x) or in_autocast(x):
        return None
    (w_gate, b_gate), (w_up, b_up), (w_down, b_down) = gate, up, down
    return gated_mlp(
        *(x, w_gate, w_up, w_down, b_gate, b_up, b_down), activation=activation, residual=residual
    )


def fuse_adapted(
    x: Tensor,
    gate: nn.Module,
    up: nn.Module,
    down: nn.Module,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor | None:
    """`lora_gated_mlp` of three LoRA layers, None if it wouldn't be the same as calling them."""
    layers = plain_lora(gate), plain_lora(up), plain_lora(down)
    if None in layers or not is_plain_tensor(x) or in_autocast(x):
        return None
    scales = {adapter_scale(module) for module in (gate, up, down)}
    if len(scales) > 1:
        return None
    return lora_gated_mlp(x, *layers, scale=scales.pop(), activation=activation, residual=residual)


class FusedFeedForward(FeedForward):
    """Drop-in for :class:`torchtune.modules.FeedForward`: same constructor, state dict and results.

    Gated feed-forwards of three ``nn.Linear``, or of three LoRA layers without active dropout, run
    as one op. Everything else, such as quantised projections, runs as in torchtune.
    """

    compute_dtype: torch.dtype | None = None  # set by patch_model, where callers use another

    @classmethod
    def from_stock(cls, module: FeedForward) -> "FusedFeedForward":
        """The same feed-forward, sharing all of its state with ``module``."""
        return share_state(module, FeedForward, cls)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Applies the feed-forward network.

        Args:
            x (Tensor): input of shape ``[..., in_dim]``.
            residual (Tensor | None): added to the result, by its last product where that can.

        Returns:
            Tensor: shape ``[..., out_dim]``, dtype of ``x``.
        """
        if residual is not None and not adds_to(residual, x):
            return residual + self.forward(x)
        dtype = self.compute_dtype
        if dtype is not None and x.dtype != dtype:
            out = self.forward(x.to(dtype)).to(x.dtype)
        elif (fused := self._as_op(x, residual)) is not None:
            return fused
        else:
            out = super().forward(x)
        return out if residual is None else residual + out

    def _as_op(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        if x.is_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled():
            # There the op is the calls that torchtune makes, and the way to it is longer.
            return None
        activation = activation_name(self.activation)
        if activation is None:
            return None
        fused = fuse_adapted if isinstance(self.w1, LoRALinear) else fuse
        return fused(x, self.w1, self.w3, self.w2, activation, residual)
