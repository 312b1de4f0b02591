import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name, tied, size in (
        ("split", False, "40KB"),
        ("single", False, "1GB"),
        ("tied", True, "1GB"),
    ):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
        folders[name] = tmp_path_factory.mktemp("pristine") / name
        model.save_pretrained(folders[name], max_shard_size=size)
    return folders


@pytest.fixture
def split(_pristine, tmp_path) -> Path:
    """A Llama checkpoint in several files with an index; the test may spoil it."""
    return Path(shutil.copytree(_pristine["split"], tmp_path / "split"))


@pytest.fixture
def single(_pristine, tmp_path) -> Path:
    """The same checkpoint in one file."""
    return Path(shutil.copytree(_pristine["single"], tmp_path / "single"))


@pytest.fixture
def tied(_pristine, tmp_path) -> Path:
    """A checkpoint whose head is its embedding."""
    return Path(shutil.copytree(_pristine["tied"], tmp_path / "tied"))


@pytest.fixture
def edit_weights():
    """Change the tensors of a checkpoint in one file: ``edit_weights(folder, function)``."""

    def edit(folder: Path, change) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.fixture
def edit_index():
    """Change the weight map of an index: ``edit_index(folder, function)``."""

    def edit(folder: Path, change) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit
