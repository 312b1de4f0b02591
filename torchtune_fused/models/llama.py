"""Llama 2, 3, 3.1, 3.2, 3.3 and look-alikes such as SmolLM2."""

from typing import Any

from torchtune_fused.models.family import DECODER_WEIGHTS, Family, Fields


def _read(fields: Fields) -> dict[str, Any]:
    attention_bias = fields.flag("attention_bias", False)
    return {
        "attn_bias": attention_bias,
        "attn_output_bias": attention_bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    interleaved_rope=True,
    rope_types=("default", "linear", "llama3"),
    weights=DECODER_WEIGHTS,
    read=_read,
)


def hf_config_from_meta(fields: Fields) -> dict[str, Any]:
    """The config.json that says what a Meta ``params.json`` says.

    Meta's file leaves out what its code knows: the context length follows from the generation of
    Llama, and so does the factor of the RoPE scaling, which is 32 for the small models of 3.2 and
    8 for those of 3.1 and 3.3.

    Args:
        fields (Fields): The file, its ``vocab_size`` filled in.

    Returns:
        dict[str, Any]: The same model in the words of transformers.
    """
    embed_dim = fields.integer("dim")
    num_heads = fields.integer("n_heads")
    scaled = fields.flag("use_scaled_rope", False)
    rope_base = fields.number("rope_theta", 10_000.0)
    config = {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.name,
        "hidden_act": "silu",
        "hidden_size": embed_dim,
        "intermediate_size": _intermediate_dim(fields, embed_dim),
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields.integer("n_layers"),
        "num_key_value_heads": fields.integer("n_kv_heads", num_heads),
        "rms_norm_eps": fields.number("norm_eps"),
        "rope_theta": rope_base,
        "tie_word_embeddings": False,
        "vocab_size": fields.integer("vocab_size"),
    }
    if scaled:
        config["max_position_embeddings"] = 131_072
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": fields.number("rope_scaling_factor", 32.0 if embed_dim < 4096 else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    else:
        config["max_position_embeddings"] = 8192 if rope_base >= 500_000 else 4096
    return config


def _intermediate_dim(fields: Fields, embed_dim: int) -> int:
    # Two thirds of 4 × dim keep SwiGLU's three matrices at the cost of two (Shazeer 2020, "GLU
    # variants improve transformer"); Meta then stretches and rounds that up.
    hidden = int(2 * 4 * embed_dim / 3)
    hidden = int(fields.number("ffn_dim_multiplier", 1.0) * hidden)
    multiple_of = fields.integer("multiple_of", 256)
    return -(-hidden // multiple_of) * multiple_of
