import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchtune.models.llama3_1 import llama3_1_8b
from torchtune.models.llama3_2 import llama3_2_1b, lora_llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_fused.flops import peak_flops, prefill_flops, training_flops

SIZES = {
    "vocab_size": 101,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 80,
    "max_seq_len": 32,
}


def tied():
    return qwen2(**SIZES, tie_word_embeddings=True)


def untied():
    return qwen2(**SIZES)


def lora():
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = lora_llama3_2(modules, True, **SIZES, lora_rank=4, lora_alpha=8)
    set_trainable_params(model, get_adapter_params(model))
    return model


@pytest.mark.parametrize("build", [tied, untied, lora])
def test_a_step_takes_the_flops_that_torch_counts(build):
    model = build()
    batch_size, seq_len = 2, 16
    tokens = torch.randint(0, 101, (batch_size, seq_len))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(tokens).sum().backward()
    # As it runs here, attention computes both halves of its causal matrices.
    masked_half = 3 * batch_size * 2 * SIZES["num_layers"] * SIZES["embed_dim"] * seq_len**2
    # Nothing needs the gradient of the first layer's input if the embedding is frozen.
    skipped = 0
    if not model.tok_embeddings.weight.requires_grad:
        attn = model.layers[0].attn
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj):
            used = projection.weight.numel() + projection.lora_a.weight.numel()
            skipped += 2 * batch_size * seq_len * used
    ours = training_flops(model, batch_size, seq_len)
    assert ours + masked_half - skipped == counted.get_total_flops()


def test_a_prefill_projects_one_position_of_each_prompt():
    model = untied()
    every_position = training_flops(model, 2, 16) / 3
    assert every_position - prefill_flops(model, 2, 16) == 2 * 15 * 2 * 64 * 101


def test_the_sizes_of_known_models_are_counted():
    with torch.device("meta"):
        one, eight = llama3_2_1b(), llama3_1_8b()
    # 1.236e9 and 8.03e9 parameters, of which 0.525e9 are an embedding that is no head; 6 a token.
    assert training_flops(one, 1, 1) == pytest.approx(6 * 1.236e9, rel=1e-3)
    assert training_flops(eight, 1, 1) == pytest.approx(6 * (8.03e9 - 0.525e9), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Some GPU", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and tflops * 1e12)


def test_a_cpu_has_no_data_sheet():
    assert peak_flops(torch.device("cpu")) is None
