import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers


@dataclass(frozen=True)
class Family:
    """A tiny random checkpoint of one family, as transformers writes it."""

    model_type: str
    dtype: torch.dtype = torch.float32
    overrides: dict = field(default_factory=dict)

    def config(self) -> transformers.PreTrainedConfig:
        sizes = {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            # Wide enough for logits of the order of 10, so that 1e-4 is a tight tolerance.
            "initializer_range": 0.2,
        }
        return transformers.AutoConfig.for_model(self.model_type, **{**sizes, **self.overrides})


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}

FAMILIES = {
    "llama2": Family("llama", overrides={"num_key_value_heads": 4}),
    "llama3.1-bf16": Family("llama", torch.bfloat16, {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2": Family(
        "llama", overrides={"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}
    ),
    "smollm2-bf16": Family(
        "llama",
        torch.bfloat16,
        {
            "hidden_size": 54,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear": Family("llama", overrides={"rope_parameters": LINEAR_ROPE}),
    "llama-biased": Family(
        "llama", overrides={"attention_bias": True, "mlp_bias": True, "head_dim": 20}
    ),
    "llama-gelu": Family("llama", overrides={"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": Family("mistral", overrides={"sliding_window": 5}),
    "mistral-v0.3-bf16": Family("mistral", torch.bfloat16, {"sliding_window": None}),
    "qwen2": Family("qwen2"),
    "qwen2.5-tied-bf16": Family("qwen2", torch.bfloat16, {"tie_word_embeddings": True}),
    "qwen2-sliding": Family("qwen2", overrides=SLIDING),
    "qwen3": Family("qwen3", overrides={"head_dim": 20}),
    "qwen3-tied-bf16": Family(
        "qwen3", torch.bfloat16, {"head_dim": 16, "tie_word_embeddings": True}
    ),
    "qwen3-sliding": Family("qwen3", overrides={"head_dim": 16, **SLIDING}),
}


def write_checkpoint(family: Family, folder: Path) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family.config())
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at one and biases at zero, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=0.5)
    model.to(family.dtype).save_pretrained(folder, max_shard_size="40KB")


def to_old_form(folder: Path) -> None:
    """Rewrite a config.json of transformers 5 as transformers 4 wrote it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def checkpoint(family, tmp_path_factory) -> Path:
    """The family's checkpoint, in several files with an index, as transformers 5 writes it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(family, folder)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="session")
def old_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The same checkpoint, its config in the form of transformers 4."""
    folder = tmp_path_factory.mktemp("checkpoint") / "old"
    shutil.copytree(checkpoint, folder)
    to_old_form(folder)
    return folder
