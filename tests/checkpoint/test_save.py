import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchtune_fused import Shard, ShardTransformerDecoder

TOKENS = torch.arange(20).view(2, 10)


def names(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_several_files_with_an_index_load_in_transformers(single, tmp_path):
    out = tmp_path / "out"
    ShardTransformerDecoder.from_pretrained(single).save_pretrained(out, max_shard_size="50KB")
    assert "model.safetensors.index.json" in names(out)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(out)(TOKENS).logits
        assert torch.equal(ours, AutoModelForCausalLM.from_pretrained(single)(TOKENS).logits)


def test_config_is_kept_but_for_the_dtype_of_the_weights(single, tmp_path):
    config = json.loads((single / "config.json").read_text())
    config["a_key_of_the_future"] = {"x": 1}
    (single / "config.json").write_text(json.dumps(config))
    ShardTransformerDecoder.from_pretrained(single).save_pretrained(tmp_path / "same")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == config
    model = ShardTransformerDecoder.from_pretrained(single, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    written = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert written == {**config, "dtype": "bfloat16"}
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_the_tokenizer_comes_along(smollm2, single, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / file, single)
    ShardTransformerDecoder.from_pretrained(single).save_pretrained(tmp_path / "out")
    text = "one, two, three"
    saved, original = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "out", smollm2))
    assert saved(text).input_ids == original(text).input_ids


def test_over_the_folder_it_came_from(single):
    before = load_file(single / "model.safetensors")
    model = ShardTransformerDecoder.from_pretrained(single)
    model.save_pretrained(single)
    after = load_file(single / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_files_of_an_earlier_save_do_not_outlive_it(single, tmp_path):
    out = tmp_path / "out"
    model = ShardTransformerDecoder.from_pretrained(single)
    model.save_pretrained(out)
    model.save_pretrained(out, max_shard_size="50KB")
    assert "model.safetensors" not in names(out)
    model.save_pretrained(out, max_shard_size="100KB")
    files = set(
        json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert {file.name for file in out.glob("*.safetensors")} == files
    (out / "notes.txt").write_text("not ours")
    model.save_pretrained(out)
    assert names(out) == {"model.safetensors", "config.json", "generation_config.json", "notes.txt"}


def test_a_save_that_fails_leaves_the_last_one(single, tmp_path):
    out = tmp_path / "out"
    model = ShardTransformerDecoder.from_pretrained(single)
    model.save_pretrained(out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.to("meta").save_pretrained(out, max_shard_size="50KB")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_part_of_a_model_is_not_saved(single, tmp_path):
    model = ShardTransformerDecoder.from_pretrained(single, Shard("llama", 1, 2))
    with pytest.raises(ValueError, match="only a whole model can be saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_a_checkpoint_has_no_name_for(single, tmp_path):
    model = ShardTransformerDecoder.from_pretrained(single)
    model.layers[1].mlp.register_parameter("adapter", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.adapter has no place"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
