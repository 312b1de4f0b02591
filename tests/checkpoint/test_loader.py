import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torchtune.models.llama3 import llama3
from transformers import LlamaForCausalLM

from torchtune_fused import Shard, ShardTransformerDecoder, load_model_weights_torchtune
from torchtune_fused.checkpoint import CheckpointError

FIRST_HALF = Shard("llama", 0, 1, 4)
LAST_HALF = Shard("llama", 2, 3, 4)
NUMBERS = {"num_heads": 4, "num_kv_heads": 2, "dim": 48}


def from_pretrained(folder, shard=None, **options):
    return ShardTransformerDecoder.from_pretrained(folder, shard, patch=False, **options)


def stock_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return llama3(
        vocab_size=97,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=48,
        max_seq_len=64,
        intermediate_dim=80,
        rope_base=10_000,
        norm_eps=1e-6,
    )


# --- What a shard reads ---------------------------------------------------------------------------


def test_a_shard_opens_only_the_files_of_its_tensors(split):
    weight_map = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if "layers.2." in name}
    spoilt = set(weight_map.values()) - needed
    for file in spoilt:
        (split / file).write_bytes(b"these are another shard's bytes")
    assert spoilt
    middle = from_pretrained(split, Shard("llama", 2, 2, 4))
    assert {name.split(".")[1] for name in middle.state_dict()} == {"2"}
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        from_pretrained(split)


def test_whole_and_single_file_hold_the_same(split, single):
    a, b = from_pretrained(split).state_dict(), from_pretrained(single).state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_dtype_is_the_checkpoints_unless_given(single):
    config = json.loads((single / "config.json").read_text())
    assert from_pretrained(single).norm.scale.dtype == torch.float32
    model = from_pretrained(single, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (single / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert from_pretrained(single).norm.scale.dtype == torch.float16
    del config["dtype"]
    (single / "config.json").write_text(json.dumps(config))
    assert from_pretrained(single).norm.scale.dtype == torch.float32


def test_weights_are_trainable_and_drag_no_others_along(single):
    for name, parameter in from_pretrained(single).named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert parameter.requires_grad


def test_training_does_not_write_to_the_checkpoint(single):
    before = (single / "model.safetensors").read_bytes()
    model = from_pretrained(single)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (single / "model.safetensors").read_bytes() == before
    again = from_pretrained(single).state_dict()
    assert all(torch.equal(again[name] + 1, tensor) for name, tensor in model.state_dict().items())


def test_the_checkpoint_may_be_replaced_or_deleted_while_in_use(single):
    model = from_pretrained(single)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(single)
    (single / "model.safetensors").unlink()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_max_seq_len_sizes_the_rope_table(single):
    model = from_pretrained(single, max_seq_len=10)
    assert model.max_seq_len == 10
    assert model.layers[0].attn.pos_embeddings.cache.shape[0] == 10
    assert model.layers[0].attn.pos_embeddings is model.layers[3].attn.pos_embeddings
    with pytest.raises(ValueError, match="max_seq_len is 0"):
        from_pretrained(single, max_seq_len=0)


# --- Into an existing model -----------------------------------------------------------------------


def test_weights_go_into_a_stock_model_in_place(single):
    model = stock_model()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_model_weights_torchtune(single, Shard("llama", 0, 3), model, **NUMBERS)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    tokens = torch.arange(20).view(2, 10)
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(single)(tokens).logits
        # fp32 on both sides, summed in different orders; logits of the order of 0.1.
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)


def test_weights_go_into_a_shard(single):
    model = from_pretrained(single, LAST_HALF)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    load_model_weights_torchtune(str(single), Shard("llama", 2, 3), model, 4, 2, 48, 12)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("shard", "numbers", "message"),
    [
        (Shard("llama", 0, 3), {**NUMBERS, "num_heads": 8}, "num_heads is 8, but .* with 4"),
        (Shard("llama", 0, 3), {**NUMBERS, "dim": 64}, "embed_dim is 64, but .* with 48"),
        (Shard("llama", 0, 3), {**NUMBERS, "head_dim": 16}, "head_dim is 16, but .* with 12"),
        (Shard("llama", 0, 3, 5), NUMBERS, "n_layers is 5, but the model has 4"),
        (Shard("llama", 0, 4), NUMBERS, "end_layer must be below n_layers"),
        (Shard("llama", 0, 1), NUMBERS, "the model holds .*end_layer=3"),
    ],
)
def test_numbers_that_do_not_fit_the_checkpoint(single, shard, numbers, message):
    with pytest.raises(ValueError, match=message):
        load_model_weights_torchtune(single, shard, stock_model(), **numbers)


def test_a_folder_without_config_is_refused(single):
    (single / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor params\.json"):
        load_model_weights_torchtune(single, Shard("llama", 0, 3), stock_model(), **NUMBERS)


def test_nothing_is_loaded_when_a_tensor_does_not_fit(single, edit_weights):
    model = stock_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edit_weights(single, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        load_model_weights_torchtune(single, Shard("llama", 0, 3), model, **NUMBERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- Tensors that do not fit ----------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named_in_one_error(single, edit_weights):
    def spoil(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.2.self_attn.v_proj.weight"] = torch.zeros(24, 7)
        weights["model.layers.3.self_attn.q_proj.bias"] = torch.zeros(48)
        weights["model.layers.4.input_layernorm.weight"] = torch.zeros(48)
        weights["model.vision_tower.weight"] = torch.zeros(3)

    edit_weights(single, spoil)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(single)
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "self_attn.v_proj.weight has shape [24, 7], expected [24, 48]" in message
    assert "model.layers.3.self_attn.q_proj.bias is unexpected" in message
    assert "model.layers.4.input_layernorm.weight is unexpected" in message
    assert "model.vision_tower.weight is unexpected" in message
    assert str(single) in message
    assert "\n" not in message


def test_a_long_list_of_problems_is_cut(single, edit_weights):
    def spoil(weights):
        for name in [name for name in weights if "mlp" in name]:
            del weights[name]

    edit_weights(single, spoil)
    with pytest.raises(CheckpointError, match="and 4 more"):
        from_pretrained(single)


def test_tensors_of_other_shards_are_not_looked_at(single, edit_weights):
    edit_weights(single, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    from_pretrained(single, FIRST_HALF)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight is missing"):
        from_pretrained(single, LAST_HALF)


def test_buffers_of_old_checkpoints_are_ignored(single, edit_weights):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(single, lambda weights: weights.update({name: torch.zeros(6)}))
    from_pretrained(single)


@pytest.mark.parametrize("shard", [None, LAST_HALF], ids=["whole", "last"])
def test_a_head_stored_beside_the_embedding_it_is_tied_to(tied, edit_weights, shard):
    embedding = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tied, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
    model = from_pretrained(tied, shard)
    head = model.tok_embeddings.weight if shard is None else model.output.weight
    assert torch.equal(head, embedding)
    edit_weights(tied, lambda weights: weights.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        from_pretrained(tied, shard)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_in_a_warning(single, edit_weights, value):
    def spoil(weights):
        weights["model.layers.1.self_attn.k_proj.weight"][3, 5] = value

    edit_weights(single, spoil)
    with pytest.warns(UserWarning, match=r"NaN or infinite values in layers\.1\.attn\.k_proj"):
        from_pretrained(single)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(single, LAST_HALF)


def test_weights_that_overflow_the_dtype_asked_for_are_named_in_a_warning(single, edit_weights):
    edit_weights(single, lambda weights: weights["model.norm.weight"].fill_(1e5))
    with pytest.warns(UserWarning, match=r"NaN or infinite values in norm\.scale"):
        from_pretrained(single, dtype=torch.float16)


def test_the_largest_finite_weights_do_not_warn(single, edit_weights):
    def widen(weights):
        weights["model.norm.weight"][:2] = torch.tensor([65504.0, -65504.0])

    edit_weights(single, widen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(single, dtype=torch.float16)
