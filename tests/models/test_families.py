"""Every family against transformers, on checkpoints that transformers wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtune_fused import ShardTransformerDecoder, load_model_config, plan_shards

TOKENS = torch.randint(0, 97, (3, 23), generator=torch.Generator().manual_seed(1))


def oracle_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens).logits


def chained_logits(folder: Path, n: int, patch: bool) -> torch.Tensor:
    h = None
    for shard in plan_shards(load_model_config(folder), n):
        model = ShardTransformerDecoder.from_pretrained(
            folder, shard, dtype=torch.float32, patch=patch
        )
        inputs = {"tokens": TOKENS} if shard.is_first_layer() else {"hidden_state": h}
        with torch.inference_mode():
            h = model(**inputs)
    return h


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
def test_logits_agree_with_transformers_whole_and_in_shards(checkpoint, patch):
    model = ShardTransformerDecoder.from_pretrained(checkpoint, dtype=torch.float32, patch=patch)
    with torch.inference_mode():
        logits = model(TOKENS)
    # fp32 on both sides, summed in different orders: logits of the order of 10, so about 1e-5.
    torch.testing.assert_close(logits, oracle_logits(checkpoint, TOKENS), atol=1e-4, rtol=0)
    for n in (2, 3):
        assert torch.equal(chained_logits(checkpoint, n, patch), logits)


def test_config_in_its_old_form_says_the_same(checkpoint, old_checkpoint):
    assert load_model_config(old_checkpoint) == load_model_config(checkpoint)
    model = ShardTransformerDecoder.from_pretrained(old_checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(TOKENS)
    # As above.
    torch.testing.assert_close(logits, oracle_logits(checkpoint, TOKENS), atol=1e-4, rtol=0)


def test_state_dict_written_back_is_the_checkpoint_bit_for_bit(checkpoint, tmp_path):
    ShardTransformerDecoder.from_pretrained(checkpoint).save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    original = {}
    for file in checkpoint.glob("*.safetensors"):
        original |= load_file(file)
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_folder_written_back_gives_the_same_logits_in_transformers(checkpoint, tmp_path):
    ShardTransformerDecoder.from_pretrained(checkpoint).save_pretrained(tmp_path)
    assert torch.equal(oracle_logits(tmp_path, TOKENS), oracle_logits(checkpoint, TOKENS))


def test_shards_state_dicts_merge_into_the_whole_models(checkpoint):
    config = load_model_config(checkpoint)
    whole = ShardTransformerDecoder.from_pretrained(checkpoint).state_dict()
    merged: dict[str, torch.Tensor] = {}
    for shard in plan_shards(config, 3):
        part = ShardTransformerDecoder.from_pretrained(checkpoint, shard).state_dict()
        assert merged.keys().isdisjoint(part)
        merged |= part
    if config.tie_word_embeddings:
        assert torch.equal(merged.pop("output.weight"), merged["tok_embeddings.weight"])
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


@pytest.mark.parametrize("patch", [False, True], ids=["stock", "patched"])
def test_smollm2_logits_agree_with_transformers(smollm2, patch):
    text = "Gravity is the force by which a planet draws objects toward its center."
    tokens = AutoTokenizer.from_pretrained(smollm2)(text, return_tensors="pt").input_ids
    model = ShardTransformerDecoder.from_pretrained(smollm2, dtype=torch.float32, patch=patch)
    with torch.inference_mode():
        logits = model(tokens)
    # fp32 on both sides; 30 layers and logits of up to 30.
    torch.testing.assert_close(logits, oracle_logits(smollm2, tokens), atol=5e-4, rtol=0)
