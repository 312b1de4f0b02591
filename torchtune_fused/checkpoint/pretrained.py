"""From a checkpoint to a decoder ready to run, and from a decoder to a folder for transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from torchtune_fused.checkpoint.adapter import WeightAdapter
from torchtune_fused.checkpoint.files import INDEX, SINGLE
from torchtune_fused.checkpoint.hub import SIDE_FILES, fetch_checkpoint
from torchtune_fused.checkpoint.loader import load_weights
from torchtune_fused.models.builder import build_decoder
from torchtune_fused.models.config import ModelConfig, load_model_config
from torchtune_fused.models.rope import init_rope
from torchtune_fused.shard.decoder import ShardTransformerDecoder
from torchtune_fused.shard.shard import Shard
from torchtune_fused.surgery import patch_model


def load_pretrained(
    path_or_repo_id: str | Path,
    shard: Shard | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    patch: bool,
    max_seq_len: int | None,
) -> ShardTransformerDecoder:
    """See :meth:`~torchtune_fused.shard.ShardTransformerDecoder.from_pretrained`."""
    folder = fetch_checkpoint(path_or_repo_id, shard)
    config = load_model_config(folder)
    device = torch.get_default_device() if device is None else torch.device(device)
    # Built without memory: each weight is allocated once, when it is read.
    with torch.device("meta"):
        model = build_decoder(config, shard, max_seq_len=max_seq_len)
    load_weights(model, config, folder, model.shard, dtype=dtype, device=device)
    init_rope(model, device)
    if patch:
        patch_model(model)
    return model.eval()


def save_pretrained(model: ShardTransformerDecoder, folder: Path, max_shard_size: str) -> None:
    """See :meth:`~torchtune_fused.shard.ShardTransformerDecoder.save_pretrained`."""
    config = model.config
    if config is None:
        raise ValueError("the model was not built from a config, so its family is not known")
    if model.shard.get_layer_count() != config.num_layers:
        raise ValueError(f"only a whole model can be saved, and this is {model.shard}")
    write_pretrained(config, model.state_dict(), folder, max_shard_size)


def write_pretrained(
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    max_shard_size: str = "5GB",
) -> None:
    """Write the weights of a whole model to a folder that transformers, and we, can load.

    Args:
        config (ModelConfig): The model; the tokenizer's files come from its folder.
        weights (Mapping[str, torch.Tensor]): The decoder's state dict.
        folder (Path): Where to; made if it is not there. Files are replaced only once all are
            written.
        max_shard_size (str): Largest size of one file of weights.

    Raises:
        ValueError: If there is a tensor that such a model has not.
    """
    adapter = WeightAdapter.for_hf(config)
    names = {name: adapter.their_name(name) for name in weights}
    for name, theirs in names.items():
        if theirs is None:
            raise ValueError(
                f"{name} has no place in a checkpoint of {config.family}; merge adapters first"
            )

    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        _write_weights(Path(staging), adapter, weights, names, max_shard_size)
        _write_json(Path(staging, "config.json"), _hf_config(config, weights))
        _copy_side_files(config.folder, Path(staging))
        _publish(Path(staging), folder)


def _write_weights(
    folder: Path,
    adapter: WeightAdapter,
    weights: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    max_shard_size: str,
) -> None:
    ours = {theirs: name for name, theirs in names.items()}
    # Only sizes matter for the split; tensors are converted one file at a time.
    plan = split_torch_state_dict_into_shards(
        {theirs: weights[name].to("meta") for theirs, name in ours.items()},
        max_shard_size=max_shard_size,
    )
    for file, tensors in plan.filename_to_tensors.items():
        save_file(
            {
                theirs: adapter.to_theirs(ours[theirs], weights[ours[theirs]]).contiguous()
                for theirs in tensors
            },
            folder / file,
            metadata={"format": "pt"},
        )
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / INDEX, index)


def _hf_config(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    # transformers 5 calls "dtype" what 4 called "torch_dtype"; both read the older name.
    key = "dtype" if "dtype" in config.hf else "torch_dtype"
    dtype = str(weights["norm.scale"].dtype).removeprefix("torch.")
    return {**config.hf, key: dtype}


def _copy_side_files(source: Path | None, folder: Path) -> None:
    for name in SIDE_FILES:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(staging: Path, folder: Path) -> None:
    """Put finished files in place, the index last, and drop weights that they supersede."""
    new = sorted(staging.iterdir(), key=lambda file: file.name == INDEX)
    old = {*folder.glob("model-*-of-*.safetensors"), folder / SINGLE, folder / INDEX}
    for file in new:
        os.replace(file, folder / file.name)
    for file in old - {folder / file.name for file in new}:
        file.unlink(missing_ok=True)
