"""Patched models in training on the GPU, against stock torchtune."""

import copy

import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2

from torchtune_fused import patch_model

SIZES = {
    "vocab_size": 500,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 512,
    "intermediate_dim": 768,
    "max_seq_len": 16384,
}


def build():
    model = llama3_2(**SIZES)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return model.to("cuda", torch.bfloat16)


def logits_and_gradients(model, tokens, mask, upstream):
    logits = model(tokens, mask=mask)
    logits.backward(upstream)
    return logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_gradients_are_as_exact_as_stock(masked, assert_as_exact):
    stock = build()
    fused, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
    patch_model(fused)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 67), device="cuda")
    mask = None
    if masked:
        mask = torch.ones(67, 67, dtype=torch.bool, device="cuda").tril().repeat(2, 1, 1)
        mask[1, 30:, :30] = False  # two documents in one row
    upstream = torch.randn(2, 67, SIZES["vocab_size"], device="cuda")
    expected = logits_and_gradients(truth, tokens, mask, upstream)
    plain = logits_and_gradients(stock, tokens, mask, upstream)
    found = logits_and_gradients(fused, tokens, mask, upstream)
    assert_as_exact(found[0], plain[0], expected[0].double(), torch.bfloat16)
    for mine, theirs, right in zip(found[1], plain[1], expected[1], strict=True):
        assert_as_exact(mine, theirs, right.double(), torch.bfloat16)


def test_memory_of_a_causal_step_is_linear_in_its_length():
    model = build()
    patch_model(model)
    peaks = []
    for length in (4096, 16384):
        tokens = torch.randint(0, SIZES["vocab_size"], (1, length), device="cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(tokens).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        model.zero_grad(set_to_none=True)
    # Four times the tokens: four times the memory, with room for the allocator's blocks.
    assert peaks[1] < 5 * peaks[0]
