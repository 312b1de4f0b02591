"""LoRA: low-rank adapters beside the frozen linear layers of a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params

from torchtune_fused.models import ModelConfig
from torchtune_fused.recipe_config import check_count, check_flags

_ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
_MLP = ("w1", "w2", "w3")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which layers get adapters, and what kind; the names are torchtune's.

    Source: LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    Args:
        lora_attn_modules (Sequence[str]): Any of q_proj, k_proj, v_proj, output_proj.
        apply_lora_to_mlp (bool): Whether to adapt the three layers of each MLP.
        apply_lora_to_output (bool): Whether to adapt the head, if it is not the embedding.
        lora_rank (int): Rank of the adapters.
        lora_alpha (float): They are scaled by ``lora_alpha / lora_rank``.
        lora_dropout (float): Dropout on their input.
        use_dora (bool): Declined.

    Raises:
        ValueError: If there is no such module, none is chosen, or a number is out of range.
    """

    lora_attn_modules: Sequence[str]
    apply_lora_to_mlp: bool
    apply_lora_to_output: bool
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    use_dora: bool = False

    def __post_init__(self) -> None:
        check_flags(vars(self), "apply_lora_to_mlp", "apply_lora_to_output", "use_dora")
        if not isinstance(self.lora_attn_modules, list | tuple):
            raise ValueError(f"lora_attn_modules must be a list, got {self.lora_attn_modules!r}")
        for name in self.lora_attn_modules:
            if name not in _ATTENTION:
                raise ValueError(
                    f"lora_attn_modules: attention has no {name!r}; it has {', '.join(_ATTENTION)}"
                )
        if not (self.lora_attn_modules or self.apply_lora_to_mlp or self.apply_lora_to_output):
            raise ValueError("LoRA is applied to no module: name some in lora_attn_modules")
        check_count("lora_rank", self.lora_rank)
        if type(self.lora_alpha) not in (int, float) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be a number above 0, got {self.lora_alpha!r}")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout!r}")
        if self.use_dora:
            raise ValueError(
                "use_dora: DoRA is not supported, since it takes the norm of each merged weight in "
                "every step, which costs what the fused layers save; use LoRA"
            )

    def check(self, config: ModelConfig) -> None:
        """Raises a ValueError if a model does not have the modules."""
        if self.apply_lora_to_output and config.tie_word_embeddings:
            raise ValueError(
                "apply_lora_to_output: the head of this model is its embedding, so there is no "
                "linear layer to adapt"
            )

    @property
    def scale(self) -> float:
        """What the product of an adapter's two matrices is multiplied by."""
        return self.lora_alpha / self.lora_rank

    def apply(self, model: TransformerDecoder, seed: int) -> None:
        """Put adapters beside a model's layers, in place; only they remain trainable.

        Args:
            model (TransformerDecoder): A model of plain linear layers; it keeps its weights.
            seed (int): Decides the adapters' values, on any device alike.
        """
        torch.manual_seed(seed)
        for layer in model.layers:
            for name in self.lora_attn_modules:
                self._adapt(layer.attn, name)
            for name in _MLP if self.apply_lora_to_mlp else ():
                self._adapt(layer.mlp, name)
        if self.apply_lora_to_output:
            self._adapt(model, "output")
        set_trainable_params(model, get_adapter_params(model))

    def _adapt(self, parent: nn.Module, name: str) -> None:
        linear = getattr(parent, name)
        with torch.device("meta"):  # all but the adapter is there already
            adapted = LoRALinear(
                linear.in_features,
                linear.out_features,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                dropout=self.lora_dropout,
                use_bias=linear.bias is not None,
            )
        adapted.to_empty(device="cpu")
        adapted.initialize_parameters()
        adapted.lora_a.to(linear.weight)
        adapted.lora_b.to(linear.weight)
        adapted.weight, adapted.bias = linear.weight, linear.bias
        setattr(parent, name, adapted)

    def merge(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the model without adapters that computes the same.

        Args:
            weights (Mapping[str, Tensor]): The state dict of a model with adapters; not changed.

        Returns:
            dict[str, Tensor]: that of the model without, in the same dtype.
        """
        merged = {}
        for name, weight in weights.items():
            module = name.removesuffix(".weight")
            if module.endswith((".lora_a", ".lora_b")):
                continue
            if f"{module}.lora_a.weight" in weights:
                a, b = (weights[f"{module}.lora_{x}.weight"].float() for x in "ab")
                weight = torch.addmm(weight.float(), b, a, alpha=self.scale).to(weight.dtype)
            merged[name] = weight
        return merged


def read_lora(section: DictConfig | None) -> LoRA:
    """The LoRA that a section of a config describes.

    Raises:
        ValueError: As of LoRA, or if there is no section, or a key is missing or unknown.
    """
    if not isinstance(section, DictConfig):
        raise ValueError(f"lora must be a section of the config, got {section!r}")
    try:
        return LoRA(**OmegaConf.to_container(section, resolve=True))
    except TypeError as error:
        raise ValueError(f"lora: {str(error).removeprefix('LoRA.__init__() ')}") from error


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those entries of a state dict that are of adapters."""
    suffixes = (".lora_a.weight", ".lora_b.weight")
    return {name: weight for name, weight in weights.items() if name.endswith(suffixes)}
