import pytest
import torch
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2

SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "embed_dim": 48,
    "intermediate_dim": 80,
    "max_seq_len": 64,
}
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 2,
    "lora_alpha": 4,
}
MODELS = {
    "llama3_1": lambda: llama3_1(**SIZES),
    "llama3_2": lambda: llama3_2(**SIZES),
    "mistral": lambda: mistral(**SIZES),
    "qwen2": lambda: qwen2(**SIZES),
    "phi3": lambda: phi3(**SIZES),
    "gemma": lambda: gemma(**SIZES, head_dim=8),
    "lora_llama3": lambda: lora_llama3(**SIZES, **LORA),
    "dora_llama3": lambda: lora_llama3(**SIZES, **LORA, use_dora=True),
}


@pytest.fixture
def build():
    """Builds one of torchtune's models at a tiny size, with parameters that all matter."""

    def build(name):
        torch.manual_seed(0)
        model = MODELS[name]()
        for module in model.modules():
            if hasattr(module, "initialize_dora_magnitude"):
                module.initialize_dora_magnitude()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    return build


@pytest.fixture(params=MODELS)
def model(request, build):
    return build(request.param)


@pytest.fixture
def llama(build):
    return build("llama3_2")
