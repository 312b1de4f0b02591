import copy

import pytest
import torch
from torch import nn
from torchtune.models.llama3_2 import llama3_2

from torchtune_fused import generate, patch_model, unpatch_model

SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 64,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = llama3_2(**SIZES).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_fp32_and_as_exact_as_a_stock_model_of_that_dtype(model, dtype):
    tokens = torch.randint(0, 101, (2, 19))
    expected = model(tokens)
    stock = copy.deepcopy(model)
    for parameter in stock.parameters():  # not .to(): that would round the angles of RoPE too
        parameter.data = parameter.data.to(dtype)
    patch_model(model, compute_dtype=dtype)
    found = model(tokens)
    assert found.dtype == torch.float32
    # The rule of the project: at most twice the error of plain PyTorch in the same dtype.
    assert (found - expected).abs().amax() <= 2 * (stock(tokens) - expected).abs().amax()


@torch.no_grad()
def test_modules_take_and_return_the_dtype_of_their_caller(model):
    layer = model.layers[0]
    patch_model(layer, compute_dtype=torch.bfloat16)
    weights = [parameter.data_ptr() for parameter in layer.parameters()]
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    x = torch.randn(2, 5, 64)
    for out in (layer(x), layer.attn(x, x), layer.attn(x, x.clone()), layer.mlp(x)):
        assert out.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert weights == [parameter.data_ptr() for parameter in layer.parameters()]


def test_caches_and_generation(model):
    patch_model(model, compute_dtype=torch.bfloat16)
    expected = generate(model, [1, 2, 3], max_new_tokens=8)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=11)  # as an fp32 caller would
    assert model.layers[0].attn.kv_cache.k_cache.dtype == torch.bfloat16
    assert torch.equal(generate(model, [1, 2, 3], max_new_tokens=8), expected)


def test_unpatching_gives_the_dtypes_back(model):
    before = copy.deepcopy(model)
    patch_model(model, compute_dtype=torch.bfloat16)
    patch_model(model, compute_dtype=torch.bfloat16)
    unpatch_model(model)
    assert type(model) is type(before)
    for (name, found), (_, was) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert found.dtype == was.dtype, name
        assert torch.equal(found, was.bfloat16().float()), name
    assert model.layers[0].attn(torch.randn(1, 2, 64), torch.randn(1, 2, 64)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_what_is_no_dtype_to_compute_in(model, dtype):
    with pytest.raises(ValueError, match="compute_dtype"):
        patch_model(model, compute_dtype=dtype)
    assert type(model).__name__ == "TransformerDecoder"


def test_caches_of_another_dtype_are_refused_before_anything_changes(model):
    model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.kv_cache is torch\.float32"):
        patch_model(model, compute_dtype=torch.bfloat16)
    assert type(model).__name__ == "TransformerDecoder"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
