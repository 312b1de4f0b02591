import os

# Set before torch is imported: every oracle runs on the CPU, and a second OpenMP runtime or an
# oversubscribed machine only makes the suite slower.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from torchtune_fused.demo import demo_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in HF form, converted once into the user's cache."""
    return demo_model()


@pytest.hookimpl(trylast=True)  # after the hook of tests/gpu, which marks its tests
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
