"""The chain of decoding ops against calling the decoder's modules, token by token."""

import copy

import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules import RMSNorm

from torchtune_fused import patch_model
from torchtune_fused.modules.decode_step import DecodeStep

SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 88,
    "max_seq_len": 64,
}
CACHE_LEN = 24


def with_head_norms(before_rope: bool):
    """A model as Qwen3 has them, or as torchtune would place the norms."""
    model = llama3_2(**SIZES)
    patch_model(model)
    for layer in model.layers:
        layer.attn.q_norm, layer.attn.k_norm = (RMSNorm(16) for _ in range(2))
        layer.attn.norm_before_rope = before_rope
    return model


def windowed():
    model = llama3_2(**SIZES)
    patch_model(model)
    for layer in model.layers:
        layer.attn.sliding_window = 3
    return model


MODELS = {
    "llama, tied head": lambda: llama3_2(**SIZES),
    "qwen2, biases": lambda: qwen2(**SIZES, tie_word_embeddings=False),
    "norms of heads before rope": lambda: with_head_norms(before_rope=True),
    "norms of heads after rope": lambda: with_head_norms(before_rope=False),
    "sliding window": windowed,
}


def prepared(build, batch: int):
    """A model as it comes and the same model patched, with one prompt in both caches."""
    torch.manual_seed(0)
    modules = build().eval()
    for parameter in modules.parameters():
        nn.init.normal_(parameter, std=0.2)  # norms and biases too: nothing may cancel
    fused = copy.deepcopy(modules)
    patch_model(fused)
    prompt = torch.randint(0, SIZES["vocab_size"], (batch, 5))
    mask = torch.ones(5, CACHE_LEN, dtype=torch.bool).tril()[None]
    for model in (modules, fused):
        model.setup_caches(batch, torch.float32, decoder_max_seq_len=CACHE_LEN)
        model(prompt, mask=mask, input_pos=torch.arange(5))
    return modules, fused


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (2, 4)])
def test_steps_equal_the_modules(name, batch, new):
    modules, fused = prepared(MODELS[name], batch)
    assert DecodeStep.obstacle(fused) is None
    step = DecodeStep(fused)
    for start in (5, 5 + new, 5 + 2 * new):
        tokens = torch.randint(0, SIZES["vocab_size"], (batch, new))
        positions = torch.arange(start, start + new)
        mask = (torch.arange(CACHE_LEN) <= positions[:, None])[None]
        expected = modules(tokens, mask=mask, input_pos=positions)
        # The last step says nothing of where it stands: the slots of the caches do.
        implied = start == 5 + 2 * new
        h = fused.tok_embeddings(tokens)
        logits = step(h, None if implied else mask, None if implied else positions)
        # fp32 sums in another order, through two layers, on logits of order one.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for layer, other in zip(modules.layers, fused.layers, strict=True):
        assert layer.attn.kv_cache.size == other.attn.kv_cache.size == 5 + 3 * new


@torch.no_grad()
def test_left_padding_is_not_seen():
    modules, fused = prepared(MODELS["llama, tied head"], 2)
    real = torch.arange(CACHE_LEN) >= torch.tensor([[0], [3]])
    tokens, positions = torch.tensor([[7], [9]]), torch.tensor([[5], [2]])
    mask = (real & (torch.arange(CACHE_LEN) <= 5))[:, None]
    expected = modules(tokens, mask=mask, input_pos=positions)
    step = DecodeStep(fused)
    logits = step(fused.tok_embeddings(tokens), mask, positions)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # as above


def test_an_obstacle_is_named():
    lora = lora_llama3_2(["q_proj"], **SIZES, lora_rank=2, lora_alpha=4)
    hooked, mixed, stock = (llama3_2(**SIZES) for _ in range(3))
    for model in (lora, hooked, mixed):
        patch_model(model)
    for model in (lora, hooked, mixed, stock):
        model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    hooked.layers[1].mlp.w2.register_forward_hook(lambda *_: None)
    mixed.layers[0].sa_norm.to(torch.bfloat16)
    no_cache = llama3_2(**SIZES)
    patch_model(no_cache)

    assert DecodeStep.obstacle(lora) == "layers.0.attn.q_proj is a FusedLoRALinear or carries hooks"
    assert DecodeStep.obstacle(hooked) == "layers.1.mlp.w2 is a Linear or carries hooks"
    assert "torch.bfloat16, torch.float32" in DecodeStep.obstacle(mixed)
    assert "layers.0.attn is a MultiHeadAttention" in DecodeStep.obstacle(stock)
    assert "no enabled KV cache" in DecodeStep.obstacle(no_cache)
