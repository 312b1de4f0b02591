import os

# Set before tokenizers is imported: its threads don't outlive a fork, of which it warns each time.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from torchtune_fused.demo import demo_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in HF form, converted once into the user's cache."""
    return demo_model()


@pytest.fixture(scope="session")
def plain_rotation():
    """Rotary position embedding by its definition, in the precision of ``x [b, s, heads, d]``."""

    def rotate(x, cos, sin, input_pos=None, *, interleaved):
        b, s, _, d = x.shape
        positions = torch.arange(s, device=x.device) if input_pos is None else input_pos.long()
        positions = positions.reshape(-1, s).expand(b, s)
        cos, sin = (t.to(x.dtype)[positions, None] for t in (cos, sin))
        one, two = (
            (slice(0, d, 2), slice(1, d, 2)) if interleaved else (slice(d // 2), slice(d // 2, d))
        )
        out = torch.empty_like(x)
        out[..., one] = x[..., one] * cos - x[..., two] * sin
        out[..., two] = x[..., two] * cos + x[..., one] * sin
        return out

    return rotate


@pytest.fixture(scope="session")
def adamw_step():
    """A step of AdamW in fp64, Algorithm 2 of Loshchilov and Hutter: the parameter, its moments."""

    def step(param, grad, m, v, number, *, lr, betas, eps, weight_decay, maximize=False):
        beta1, beta2 = betas
        param, m, v, grad = (t.double() for t in (param, m, v, -grad if maximize else grad))
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        direction = m / (1 - beta1**number) / ((v / (1 - beta2**number)).sqrt() + eps)
        return param - lr * (direction + weight_decay * param), m, v

    return step


@pytest.fixture(scope="session")
def transformers_filter():
    """Logits as transformers leaves them for sampling: divided, and -inf where it discards them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    def run(logits, temperature, top_k=None, top_p=None):
        logits = TemperatureLogitsWarper(temperature)(None, logits)
        if top_k is not None:
            logits = TopKLogitsWarper(top_k)(None, logits)
        if top_p is not None:
            logits = TopPLogitsWarper(top_p)(None, logits)
        return logits

    return run


@pytest.hookimpl(trylast=True)  # after the hook of tests/gpu, which marks its tests
def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
