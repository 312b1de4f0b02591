"""What all sections share: the config, the machine, and the model's structure."""

from dataclasses import dataclass
from functools import cached_property

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_fused.models.builder import build_decoder
from torchtune_fused.models.config import load_model_config
from torchtune_fused.recipe_component import instantiate
from torchtune_fused.recipe_config import check_count, expand_path
from torchtune_fused.recipe_model import device_and_dtype, load_model


@dataclass(frozen=True)
class Setting:
    """Where and on what model the systems run.

    Args:
        cfg (DictConfig): The config.
        device (torch.device): Where the systems run.
        dtype (torch.dtype): Of the weights.
    """

    cfg: DictConfig
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, cfg: DictConfig) -> "Setting":
        """The setting that a config names; ValueError if this machine has not that device."""
        return cls(cfg, *device_and_dtype(cfg))

    @cached_property
    def structure(self) -> TransformerDecoder:
        """The model on the meta device, without weights."""
        with torch.device("meta"):
            if self.cfg.checkpoint is not None:
                return build_decoder(load_model_config(expand_path(self.cfg.checkpoint)))
            # On the command line, torchtune takes model=null for its component.
            if self.cfg.model is None or self.cfg.model.get("_component_") is None:
                raise ValueError("checkpoint and model are both null: set one of them")
            model = instantiate("model", self.cfg.model)
        if not isinstance(model, TransformerDecoder):
            raise ValueError(
                f"{self.cfg.model['_component_']}: expected a torchtune TransformerDecoder, got "
                f"{type(model).__name__}"
            )
        return model

    def load_model(self, *, patch: bool) -> TransformerDecoder:
        """The model with its weights, stock or patched."""
        return load_model(self.cfg, self.device, self.dtype, patch=patch)

    def of_model(self, model: DictConfig) -> "Setting":
        """The same setting with a model of random weights."""
        cfg = OmegaConf.merge(self.cfg, {"checkpoint": None})
        cfg.model = model
        return Setting(cfg, self.device, self.dtype)

    def random_tokens(self, batch_size: int, seq_len: int) -> Tensor:
        """Token ids ``[batch_size, seq_len]``, the same whenever they are asked for."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        vocab_size = self.structure.tok_embeddings.num_embeddings
        tokens = torch.randint(vocab_size, (batch_size, seq_len), generator=generator)
        return tokens.to(self.device)

    def check_length(self, tokens: int) -> None:
        """Raise a ValueError if the model can't take so many tokens in a row."""
        if tokens > (most := self.structure.max_seq_len):
            raise ValueError(f"{tokens} tokens exceed the model's max_seq_len of {most}")

    def section(self, name: str) -> DictConfig:
        """The part of the config that a section reads.

        Raises:
            ValueError: If there is none, or it has a key that none has.
        """
        section = self.cfg.get(name)
        if section is None:
            raise ValueError(f"the config has no {name!r}, which the section {name} reads")
        if unknown := set(section) - {"shapes", "new_tokens", "model"}:
            raise ValueError(f"{name} has no {unknown.pop()!r}, only shapes, new_tokens or model")
        return section

    def shapes(self, name: str) -> list[tuple[int, int]]:
        """The pairs of batch size and tokens that a section lists.

        Raises:
            ValueError: If they are not.
        """
        shapes = self.section(name).get("shapes")
        plain = OmegaConf.to_container(shapes) if OmegaConf.is_list(shapes) else None
        if not plain or not all(isinstance(s, list) and len(s) == 2 for s in plain):
            raise ValueError(f"{name}.shapes must list [batch size, tokens] pairs, got {shapes}")
        return [tuple(check_count(f"{name}.shapes", size) for size in pair) for pair in plain]
