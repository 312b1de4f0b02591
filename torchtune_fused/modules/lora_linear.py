"""torchtune's LoRALinear, alone or as one of three projections, on the fused ops."""

from typing import Any

from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear

from torchtune_fused.modules._plain import (
    in_autocast,
    is_plain,
    is_plain_tensor,
    plain_linear,
    share_state,
)
from torchtune_fused.ops import AdaptedLinear, lora_linear


class FusedLoRALinear(LoRALinear):
    """Drop-in for :class:`torchtune.modules.peft.LoRALinear`: same constructor, state and results.

    The adapter's product is summed into that of the frozen weight. Quantised weights, and adapters
    with hooks or of other classes, run as in torchtune.
    """

    @classmethod
    def from_stock(cls, module: LoRALinear) -> "FusedLoRALinear":
        """The same layer, sharing all of its state with ``module``."""
        return share_state(module, LoRALinear, cls)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the linear layer and, unless ``disabled``, its adapter.

        Args:
            x (Tensor): input of shape ``[..., in_dim]``.

        Returns:
            Tensor: shape ``[..., out_dim]``.
        """
        layer = None if self.disabled else adapted_linear(self)
        if layer is None or not is_plain_tensor(x) or in_autocast(x):
            return super().forward(x)
        seen = self.dropout(x) if _drops(self) else None
        weight, a, b, bias = layer
        return lora_linear(x, weight, a, b, bias, scale=adapter_scale(self), adapter_input=seen)


def adapted_linear(module: LoRALinear) -> AdaptedLinear | None:
    """The tensors of a LoRA layer, None if its parts have to be called or are quantised."""
    a, b = plain_linear(module.lora_a), plain_linear(module.lora_b)
    parameters = module.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        a is None
        or b is None
        or module._quantize_base
        or weight is None
        or not is_plain_tensor(weight)
        or not (bias is None or is_plain_tensor(bias))
        or not (is_plain(module.dropout, nn.Identity) or is_plain(module.dropout, nn.Dropout))
    ):
        return None
    return AdaptedLinear(weight, a[0], b[0], bias)


def plain_lora(module: nn.Module) -> AdaptedLinear | None:
    """The tensors of a LoRA layer; None if using them is not the same as calling it."""
    if not _is_lora(module) or module.disabled or _drops(module):
        return None
    return adapted_linear(module)


def _is_lora(module: nn.Module) -> bool:
    return is_plain(module, FusedLoRALinear) or is_plain(module, LoRALinear)


def qkv_layers(x: Tensor, *modules: nn.Module) -> tuple[list[AdaptedLinear], dict[str, Any]] | None:
    """Layers and options by which `qkv_linear` does what three modules do, adapters or none.

    Adapters may drop some of their input, each by a draw of its own: what is given is for one call.

    Returns:
        tuple[list[AdaptedLinear], dict[str, Any]] | None: None if calling the modules isn't the
        same.
    """
    if in_autocast(x) or not is_plain_tensor(x):
        return None
    layers = [_any_linear(module) for module in modules]
    if None in layers:
        return None
    adapted = [module for module, layer in zip(modules, layers, strict=True) if layer.a is not None]
    scales = {adapter_scale(module) for module in adapted}
    if len(scales) > 1:
        return None
    # In the order of the layers, as calling them would draw.
    seen = [m.dropout(x) if m in adapted and _drops(m) else None for m in modules]
    return layers, {"scale": scales.pop() if scales else 1.0, "adapter_inputs": seen}


def _any_linear(module: nn.Module) -> AdaptedLinear | None:
    """The tensors of a plain layer of either kind."""
    if not _is_lora(module):
        linear = plain_linear(module)
        return None if linear is None else AdaptedLinear(linear[0], bias=linear[1])
    layer = adapted_linear(module)
    if layer is None or not module.disabled:
        return layer
    return AdaptedLinear(layer.weight, bias=layer.bias)


def adapter_scale(module: LoRALinear) -> float:
    """The factor of a layer's adapter."""
    return module.alpha / module.rank


def _drops(module: LoRALinear) -> bool:
    dropout = module.dropout
    return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
