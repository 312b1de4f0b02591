"""LoRA adapters as files of the peft package, which transformers loads on top of a base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from torchtune_fused.checkpoint.adapter import WeightAdapter
from torchtune_fused.checkpoint.files import CheckpointError
from torchtune_fused.models import ModelConfig

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_LORA = {".lora_a.weight": ".lora_A.weight", ".lora_b.weight": ".lora_B.weight"}


def write_adapter(
    config: ModelConfig,
    adapter: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    base: str,
    rank: int,
    alpha: float,
    dropout: float,
) -> None:
    """Write LoRA adapters to a folder.

    Args:
        config (ModelConfig): The base model.
        adapter (Mapping[str, torch.Tensor]): ``lora_a.weight`` ``[rank, in]`` and
            ``lora_b.weight`` ``[out, rank]`` of each adapted module, by their names in torchtune.
        folder (Path): Where to; made if it is not there.
        base (str): Folder or repository of the base model.
        rank (int): Rank of the adapters.
        alpha (float): They are scaled by ``alpha / rank``.
        dropout (float): Dropout on their input that they were trained with.
    """
    names = WeightAdapter.for_hf(config)
    tensors, targets = {}, set()
    for name, tensor in adapter.items():
        weight, theirs = _their_name(name, names)
        targets.add(theirs.split(".lora_")[0].rsplit(".", 1)[-1])
        # Rows of the q and k projections are permuted, and rows of the product are those of B.
        rows = name.endswith(".lora_b.weight")
        tensors[theirs] = (names.to_theirs(weight, tensor) if rows else tensor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    description: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    (folder / _CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_adapter(config: ModelConfig, adapter: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Read LoRA adapters that :func:`write_adapter` wrote into tensors of the same names.

    Args:
        config (ModelConfig): The base model.
        adapter (Mapping[str, torch.Tensor]): The tensors to fill, by their names in torchtune.
        folder (Path): The folder.

    Raises:
        FileNotFoundError: If the folder holds no adapter.
        CheckpointError: If the file is corrupt, or has other tensors.
    """
    path = folder / _WEIGHTS
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    names = WeightAdapter.for_hf(config)
    sources = {name: _their_name(name, names) for name in adapter}
    expected = {theirs: adapter[name].shape for name, (_, theirs) in sources.items()}
    if {name: tensor.shape for name, tensor in stored.items()} != expected:
        raise CheckpointError(f"{path}: does not hold the adapters of this config")
    with torch.no_grad():
        for name, (weight, theirs) in sources.items():
            rows = name.endswith(".lora_b.weight")
            tensor = stored[theirs]
            adapter[name].copy_(names.to_ours(weight, tensor) if rows else tensor)


def _their_name(name: str, names: WeightAdapter) -> tuple[str, str]:
    """Names of the adapted weight in torchtune, and of an adapter's tensor in peft."""
    suffix = next(suffix for suffix in _LORA if name.endswith(suffix))
    weight = name.removesuffix(suffix) + ".weight"
    module = names.their_name(weight).removesuffix(".weight")
    return weight, f"base_model.model.{module}{_LORA[suffix]}"
