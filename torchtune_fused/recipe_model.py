"""The device, dtype and model that a config names."""

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import training, utils
from torchtune.modules import TransformerDecoder

from torchtune_fused.recipe_component import instantiate
from torchtune_fused.recipe_config import expand_path
from torchtune_fused.shard import ShardTransformerDecoder
from torchtune_fused.surgery import patch_model


def device_and_dtype(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of the config, if this machine has them.

    Raises:
        ValueError: If it has not.
    """
    try:
        device = utils.get_device(None if cfg.device == "auto" else cfg.device)
        if cfg.device not in ("auto", None) and torch.device(cfg.device).type != device.type:
            raise RuntimeError(f"there is none, only {device.type}")
        torch.empty(0, device=device)  # or nothing but the first weight would say what is wrong
        return device, training.get_dtype(cfg.dtype, device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={cfg.device} dtype={cfg.dtype}: {error}") from error


def load_model(
    cfg: DictConfig, device: torch.device, dtype: torch.dtype, *, patch: bool
) -> TransformerDecoder:
    """The model of ``checkpoint`` or, if that is null, ``model`` with random weights.

    Args:
        cfg (DictConfig): Holds ``checkpoint``, ``model`` and ``seed``, which decides the weights.
        device (torch.device): Where to put it.
        dtype (torch.dtype): Dtype of its weights.
        patch (bool): Whether to swap in the fused modules.

    Returns:
        TransformerDecoder: the model.

    Raises:
        ValueError: If both are null, or as ``from_pretrained``.
    """
    if cfg.checkpoint is not None:
        return ShardTransformerDecoder.from_pretrained(
            expand_path(cfg.checkpoint), dtype=dtype, device=device, patch=patch
        )
    if cfg.model is None:
        raise ValueError("checkpoint and model are both null: set one of them")
    torch.manual_seed(cfg.seed)
    with training.set_default_dtype(dtype), device:
        model = instantiate("model", cfg.model)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            else:  # a norm's scale of exactly 1, or a bias of 0, would be one that may be left out
                parameter.data += 0.1 * torch.randn_like(parameter)
    if patch:
        patch_model(model)
    return model
