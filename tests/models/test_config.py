import json

import pytest
import torch

from torchtune_fused import ShardTransformerDecoder, load_model_config
from torchtune_fused.models import ConfigError, UnsupportedModelError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Meta's own file for Llama 3.1 8B.
META = {
    "dim": 4096,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "n_heads": 32,
    "n_kv_heads": 8,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}


@pytest.fixture
def read(tmp_path):
    def write_and_read(content: object, name: str = "config.json"):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
        return load_model_config(tmp_path)

    return write_and_read


def without(key: str) -> dict:
    return {name: value for name, value in LLAMA.items() if name != key}


def test_keys_of_the_dictionary_it_replaces(read):
    config = read({**LLAMA, "attention_bias": True, "rope_scaling": LLAMA3_ROPE})
    assert config["embed_dim"] == config.embed_dim == 64
    assert {
        "rope_scaling": config["rope_scaling"]["factor"],
        **{
            key: config[key]
            for key in (
                "num_heads",
                "head_dim",
                "num_kv_heads",
                "max_seq_len",
                "intermediate_dim",
                "attn_dropout",
                "norm_eps",
                "rope_base",
                "vocab_size",
                "num_layers",
                "attn_bias",
                "hidden_act",
            )
        },
    } == {
        "rope_scaling": 8.0,
        "num_heads": 4,
        "head_dim": 16,
        "num_kv_heads": 2,
        "max_seq_len": 256,
        "intermediate_dim": 96,
        "attn_dropout": 0.0,
        "norm_eps": 1e-5,
        "rope_base": 10_000.0,
        "vocab_size": 128,
        "num_layers": 3,
        "attn_bias": True,
        "hidden_act": "silu",
    }
    assert "head_dim" in config
    assert "head_size" not in config
    assert config.get("head_size", 7) == 7
    with pytest.raises(KeyError):
        config["head_size"]


def test_a_file_or_its_folder(tmp_path, read):
    assert read(LLAMA) == load_model_config(tmp_path / "config.json")
    assert load_model_config(str(tmp_path)).model_id == tmp_path.name


def test_rope_of_transformers_4_and_5(read):
    old = read({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = read(
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        }
    )
    assert old == new
    assert new.rope_base == 5e5
    assert new.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_transformers_4_and_5(read, key):
    assert read({**LLAMA, key: "bfloat16"}).dtype == torch.bfloat16


def test_sliding_windows_of_the_families(read):
    qwen = {**LLAMA, "model_type": "qwen2", "sliding_window": 9, "max_window_layers": 1}
    assert read(qwen).sliding_windows == (None, None, None)
    assert read({**qwen, "use_sliding_window": True}).sliding_windows == (None, 9, 9)
    types = ["sliding_attention", "full_attention", "full_attention"]
    by_type = {**qwen, "use_sliding_window": True, "layer_types": types}
    assert read(by_type).sliding_windows == (9, None, None)
    assert read({**qwen, "model_type": "mistral"}).sliding_windows == (9, 9, 9)
    assert read(LLAMA).sliding_windows == (None, None, None)


def test_meta_params_say_what_transformers_config_does(read):
    config = read(META, "params.json")
    # As in the config.json of meta-llama/Llama-3.1-8B.
    assert (config.intermediate_dim, config.head_dim, config.max_seq_len) == (14336, 128, 131072)
    assert config.rope_scaling == LLAMA3_ROPE
    assert config.rope_base == 500_000.0


def test_meta_params_of_the_small_models_of_llama_3_2(read):
    small = {**META, "dim": 2048, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_layers": 16}
    config = read(small, "params.json")
    # As in the config.json of meta-llama/Llama-3.2-1B.
    assert config.intermediate_dim == 8192
    assert config.rope_scaling["factor"] == 32.0


def test_meta_params_of_llama_2_take_the_vocabulary_from_the_checkpoint(read, tmp_path):
    llama2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5}
    with pytest.raises(ConfigError, match=r"vocab_size is not given.*consolidated"):
        read({**llama2, "vocab_size": -1}, "params.json")
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"consolidated\.00\.pth could not be read for it"):
        read({**llama2, "vocab_size": -1}, "params.json")
    for part in ("00", "01"):
        torch.save({"output.weight": torch.zeros(16000, 1)}, tmp_path / f"consolidated.{part}.pth")
    config = read({**llama2, "vocab_size": -1}, "params.json")
    assert config.vocab_size == 32000
    assert (config.intermediate_dim, config.num_kv_heads, config.max_seq_len) == (11008, 32, 4096)
    assert config.rope_scaling is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**LLAMA, "model_type": "gemma9"}, "model family 'gemma9'.*llama, mistral, qwen2, qwen3"),
        ({**LLAMA, "hidden_act": "mish"}, "activation 'mish'.*silu, swish, gelu"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "RoPE type 'yarn'.*default, linear, llama3",
        ),
        (
            {**LLAMA, "model_type": "qwen2", "rope_scaling": {"type": "linear", "factor": 4.0}},
            "for qwen2, RoPE type 'linear'.*supported: default",
        ),
        (
            {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA, "dtype": "float8_e9m9"}, "dtype 'float8_e9m9'.*bfloat16"),
        (
            {**LLAMA, "model_type": "qwen3", "layer_types": ["linear_attention"] * 3},
            "layer type 'linear_attention'.*full_attention, sliding_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named_with_what_is(read, content, message):
    with pytest.raises(UnsupportedModelError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({}, "'model_type' is missing"),
        (without("hidden_size"), "'hidden_size' is missing"),
        (without("rms_norm_eps"), "'rms_norm_eps' is missing"),
        ({**LLAMA, "hidden_size": -64}, "hidden_size is -64, expected a positive integer"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size is '64', expected a positive integer"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**LLAMA, "attention_dropout": 1.5}, "attention_dropout is 1.5"),
        ({**LLAMA, "tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({**LLAMA, "num_attention_heads": 5, "head_dim": 16}, "5 heads do not divide"),
        ({**LLAMA, "num_key_value_heads": 3}, "3 kv heads do not divide 4 heads"),
        ({**LLAMA, "head_dim": 15}, "head_dim is 15, but RoPE needs an even one"),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_scaling: the key 'factor'"),
        (
            {**LLAMA, "rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
            "low_freq_factor must be below high_freq_factor",
        ),
        (
            {**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 3 layers",
        ),
    ],
)
def test_a_corrupt_config_is_one_clear_line(read, tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(content)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor params\.json"):
        load_model_config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        load_model_config(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError, match="neither"):
        ShardTransformerDecoder.from_pretrained(tmp_path)
