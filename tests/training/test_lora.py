import copy

import pytest
import torch
from torchtune.models.llama3_2 import llama3_2

from torchtune_fused.training.lora import LoRA

SIZES = {
    "vocab_size": 50,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 16,
}
SETTINGS = {
    "lora_attn_modules": ["q_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": False,
    "lora_rank": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.5,
}


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    model = llama3_2(**SIZES)
    LoRA(**SETTINGS).apply(model, seed=1)
    return model


def test_a_fresh_adapter_changes_nothing_and_dropout_only_in_training(adapted):
    tokens = torch.randint(0, 50, (2, 9))
    torch.manual_seed(0)
    base = llama3_2(**SIZES)
    assert adapted(tokens).equal(base(tokens))
    for name, parameter in adapted.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter)
    assert not adapted(tokens).equal(adapted(tokens))
    adapted.eval()
    assert adapted(tokens).equal(adapted(tokens))


def test_adapters_are_where_they_were_asked_for_and_alone_are_trained(adapted):
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    modules = ("attn.q_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3")
    assert trained == {
        f"layers.{layer}.{module}.lora_{x}.weight"
        for layer in range(2)
        for module in modules
        for x in "ab"
    }


def test_the_seed_decides_the_adapters():
    def adapters(seed):
        model = llama3_2(**SIZES)
        LoRA(**SETTINGS).apply(model, seed)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_a" in n])

    assert adapters(1).equal(adapters(1))
    assert not adapters(1).equal(adapters(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_compute_what_the_adapters_do(adapted, dtype):
    lora = LoRA(**SETTINGS)
    for name, parameter in adapted.named_parameters():
        if "lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = adapted.to(dtype).eval()
    before = copy.deepcopy(adapted.state_dict())
    merged = lora.merge(adapted.state_dict())
    for name, weight in adapted.state_dict().items():
        assert weight.equal(before[name])
    truth = copy.deepcopy(adapted).double()
    model = llama3_2(**SIZES).to(dtype)
    model.load_state_dict(merged)
    tokens = torch.randint(0, 50, (2, 9))
    if dtype == torch.float32:
        # fp32 sums in another order.
        torch.testing.assert_close(model(tokens), adapted(tokens), rtol=0, atol=1e-5)
    for name in ("layers.0.attn.q_proj", "layers.1.mlp.w2"):
        module = truth.get_submodule(name)
        a, b = module.lora_a.weight, module.lora_b.weight
        exact = module.weight + 2.0 * b @ a
        # Rounded to the dtype once, after three products and four sums in fp32.
        terms = module.weight.abs() + 2.0 * b.abs() @ a.abs()
        limit = torch.finfo(dtype).eps * exact.abs() + 4 * torch.finfo(torch.float32).eps * terms
        assert ((merged[f"{name}.weight"].double() - exact).abs() <= limit).all()
