from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchtune_fused import Shard, ShardTransformerDecoder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A tiny random Llama checkpoint of 4 layers, 97 tokens and 32 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(llama):
    """``load(start, end)`` gives those layers of the checkpoint, ``load()`` all of them."""

    def load(start: int = 0, end: int = 3, patch: bool = True) -> ShardTransformerDecoder:
        return ShardTransformerDecoder.from_pretrained(
            llama, Shard("llama", start, end), patch=patch
        )

    return load
