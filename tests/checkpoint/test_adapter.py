import pytest
import torch
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune

from torchtune_fused import load_model_config
from torchtune_fused.checkpoint import WeightAdapter
from torchtune_fused.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_each_name_goes_there_and_back(family):
    adapter = WeightAdapter(family.weights, None)
    for theirs in family.weights:
        theirs = theirs.replace("{layer}", "17")
        ours = adapter.our_name(theirs)
        assert adapter.their_name(ours) == theirs
        assert ("17" in ours) == ("17" in theirs)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.01.input_layernorm.weight",
        "model.layers.{layer}.input_layernorm.weight",
        "model.layers..input_layernorm.weight",
        "layers.1.sa_norm.scale",
        "",
    ],
)
def test_a_name_that_no_family_has_is_none(name):
    assert WeightAdapter(FAMILIES["llama"].weights, None).our_name(name) is None


def test_llama_is_converted_as_torchtune_converts_it(single):
    config = load_model_config(single)
    adapter = WeightAdapter.for_hf(config)
    stored = load_file(single / "model.safetensors")
    converted = {}
    for theirs, tensor in stored.items():
        ours = adapter.our_name(theirs)
        converted[ours] = adapter.to_ours(ours, tensor)
    expected = hf_to_tune(
        stored, num_heads=4, num_kv_heads=2, dim=config.embed_dim, head_dim=config.head_dim
    )
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_q_and_k_come_back_bit_for_bit(head_dim, kind, dtype):
    adapter = WeightAdapter(FAMILIES["llama"].weights, head_dim)
    shape = (3 * head_dim, 5) if kind == "weight" else (3 * head_dim,)
    tensor = torch.randn(shape).to(dtype)
    name = f"layers.0.attn.q_proj.{kind}"
    ours = adapter.to_ours(name, tensor)
    assert ours.shape == tensor.shape
    assert torch.equal(adapter.to_theirs(name, ours), tensor)
    # The first pair that RoPE rotates: rows 0 and d/2 of a head, neighbours here.
    assert torch.equal(ours[1], tensor[head_dim // 2])
