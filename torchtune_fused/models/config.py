"""ModelConfig: one typed description of a model, read from the config its checkpoint came with."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from torchtune_fused.models.family import ConfigError, Family, Fields
from torchtune_fused.models.llama import LLAMA, hf_config_from_meta
from torchtune_fused.models.mistral import MISTRAL
from torchtune_fused.models.qwen2 import QWEN2
from torchtune_fused.models.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}

# The activations of the gated MLP, by the names that configs use.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_SCALING_FACTORS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Mapping[str, Any]):
    """Everything that decides the structure of a decoder, in torchtune's terms.

    Also a read-only mapping over its fields: ``config["embed_dim"]``, ``config.get("head_dim")``
    and ``"num_heads" in config`` work.

    Args:
        family (str): Name of its :class:`~torchtune_fused.models.family.Family`.
        vocab_size (int): Tokens in the vocabulary.
        num_layers (int): Transformer layers of the whole model.
        embed_dim (int): Width of the hidden state.
        num_heads (int): Query heads.
        num_kv_heads (int): Key and value heads.
        head_dim (int): Width of one head.
        intermediate_dim (int): Width inside the gated MLP.
        max_seq_len (int): Longest sequence, in tokens, that the model was made for.
        norm_eps (float): Epsilon of the RMSNorms.
        rope_base (float): Base of the geometric progression of RoPE's angles.
        rope_scaling (dict[str, Any] | None): ``rope_type`` (``"linear"`` or ``"llama3"``) and its
            factors, by their names in transformers; None for plain RoPE.
        hidden_act (str): ``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"relu"``.
        attn_dropout (float): Dropout on the attention probabilities, in training.
        attn_bias (bool): Whether the q, k and v projections have biases.
        attn_output_bias (bool): Whether the output projection of attention has one.
        mlp_bias (bool): Whether the projections of the MLP have biases.
        qk_norm (bool): Whether each head of q and k is normalised before RoPE.
        tie_word_embeddings (bool): Whether the head is the embedding.
        sliding_windows (tuple[int | None, ...]): For each layer, how many positions back a query
            sees, itself included; None for all.
        dtype (torch.dtype | None): Dtype that the config says its weights have.
        hf (Mapping[str, Any]): The config.json, as parsed.
        folder (Path | None): Folder that the config was read from.
    """

    family: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_scaling: dict[str, Any] | None
    hidden_act: str
    attn_dropout: float
    attn_bias: bool = False
    attn_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...]
    dtype: torch.dtype | None = field(compare=False)
    hf: Mapping[str, Any] = field(compare=False, repr=False)
    folder: Path | None = field(compare=False)

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, folder: Path | None = None, where: str = "config.json"
    ) -> ModelConfig:
        """Read a parsed config.json, as transformers 4 or 5 write it.

        Args:
            hf (Mapping[str, Any]): The parsed JSON.
            folder (Path | None): Where it lies, if it does.
            where (str): What to call it in errors.

        Raises:
            UnsupportedModelError: If its family, activation, RoPE or quantization is not supported.
            ConfigError: If a key is missing or nonsense.
        """
        raw = Fields(hf, where)
        family_name = raw.string("model_type")
        if family_name not in FAMILIES:
            raise raw.unsupported("model family", family_name, FAMILIES)
        family = FAMILIES[family_name]
        if raw.section("quantization_config") is not None:
            raise raw.unsupported("a quantized checkpoint,", "quantization_config", ["plain ones"])
        activation = raw.string("hidden_act", "silu")
        if activation not in ACTIVATIONS:
            raise raw.unsupported("activation", activation, ACTIVATIONS)

        embed_dim = raw.integer("hidden_size")
        num_layers = raw.integer("num_hidden_layers")
        num_heads = raw.integer("num_attention_heads")
        rope_base, rope_scaling = _read_rope(raw, family)
        values = {
            "embed_dim": embed_dim,
            "num_heads": num_heads,
            "num_kv_heads": raw.integer("num_key_value_heads", num_heads),
            "head_dim": raw.integer("head_dim", max(embed_dim // num_heads, 1)),
            "sliding_windows": (None,) * num_layers,
            **family.read(raw),
        }
        if embed_dim % num_heads:
            raise raw.error(f"{num_heads} heads do not divide hidden_size {embed_dim}")
        if num_heads % values["num_kv_heads"]:
            raise raw.error(f"{values['num_kv_heads']} kv heads do not divide {num_heads} heads")
        if values["head_dim"] % 2:
            raise raw.error(f"head_dim is {values['head_dim']}, but RoPE needs an even one")
        return cls(
            family=family.name,
            vocab_size=raw.integer("vocab_size"),
            num_layers=num_layers,
            intermediate_dim=raw.integer("intermediate_size"),
            max_seq_len=raw.integer("max_position_embeddings"),
            norm_eps=raw.number("rms_norm_eps"),
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            hidden_act=ACTIVATIONS[activation],
            attn_dropout=raw.fraction("attention_dropout", 0.0),
            tie_word_embeddings=raw.flag("tie_word_embeddings", False),
            dtype=_read_dtype(raw),
            hf=hf,
            folder=folder,
            **values,
        )

    @property
    def model_id(self) -> str:
        """A name for the model: that of its folder, or else of its family."""
        return self.folder.name if self.folder else self.family

    def layer_parameters(self) -> int:
        """How many parameters one transformer layer has."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        total = self.embed_dim * (2 * q_dim + 2 * kv_dim + 3 * self.intermediate_dim)
        total += 2 * self.embed_dim  # the two norms
        total += self.attn_bias * (q_dim + 2 * kv_dim) + self.attn_output_bias * self.embed_dim
        total += self.mlp_bias * (2 * self.intermediate_dim + self.embed_dim)
        return total + self.qk_norm * 2 * self.head_dim

    def __getitem__(self, key: str) -> Any:
        if key not in _FIELD_NAMES:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_FIELD_NAMES)

    def __len__(self) -> int:
        return len(_FIELD_NAMES)


_FIELD_NAMES = tuple(f.name for f in fields(ModelConfig))


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the config of a model.

    Args:
        path (str | Path): A ``config.json`` of transformers, a Meta ``params.json``, or a folder
            that holds one of them.

    Returns:
        ModelConfig: The description of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsupportedModelError: If the model's family, RoPE, activation or format is not supported.
        ConfigError: If the file is not JSON, a key is missing, or a value is nonsense.
    """
    file = _find_config(Path(path))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(raw).__name__}")
    if "model_type" not in raw and "n_layers" in raw:
        if raw.get("vocab_size", -1) == -1:
            raw["vocab_size"] = _vocab_size_of_checkpoint(file)
        raw = hf_config_from_meta(Fields(raw, str(file)))
    return ModelConfig.from_hf(raw, folder=file.parent, where=str(file))


def _find_config(path: Path) -> Path:
    candidates = [path / "config.json", path / "params.json"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file():
            return file
    if any((path / part / "adapter_config.json").is_file() for part in (".", "adapter")):
        raise FileNotFoundError(
            f"{path}: the folder holds LoRA adapters without their model: let peft load them, or "
            "train with save_adapter_weights_only=false"
        )
    if path.is_dir():
        raise FileNotFoundError(f"{path}: the folder holds neither config.json nor params.json")
    raise FileNotFoundError(f"{path}: no such file or folder; expected a model's config.json")


def _read_rope(raw: Fields, family: Family) -> tuple[float, dict[str, Any] | None]:
    # transformers 5 keeps all of RoPE in one section; 4 had the base next to it.
    parameters = raw.section("rope_parameters")
    if parameters is not None:
        base = parameters.number("rope_theta", 10_000.0)
    else:
        base = raw.number("rope_theta", 10_000.0)
        parameters = raw.section("rope_scaling")
    if parameters is None:
        return base, None
    # "type" is what "rope_type" was called before transformers 4.43.
    kind = parameters.string("rope_type", parameters.string("type", "default"))
    if kind not in family.rope_types:
        raise parameters.unsupported(f"for {family.name}, RoPE type", kind, family.rope_types)
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        raise parameters.unsupported("RoPE over a part of a head,", "partial_rotary_factor", ["1"])
    if kind == "default":
        return base, None
    factors = {name: parameters.number(name) for name in _SCALING_FACTORS[kind]}
    if kind == "llama3" and factors["low_freq_factor"] >= factors["high_freq_factor"]:
        raise parameters.error("low_freq_factor must be below high_freq_factor")
    return base, {"rope_type": kind, **factors}


def _read_dtype(raw: Fields) -> torch.dtype | None:
    name = raw.string("dtype", raw.string("torch_dtype", None))
    if name is None:
        return None
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise raw.unsupported("dtype", name, ["float32", "float16", "bfloat16"])
    return dtype


def _vocab_size_of_checkpoint(params: Path) -> int:
    # Meta's Llama 2 says -1, "as many as the tokenizer has"; the head, split by rows over the
    # files, has one row for each.
    parts = sorted(params.parent.glob("consolidated.*.pth"))
    if not parts:
        raise ConfigError(
            f"{params}: vocab_size is not given, and there is no consolidated.*.pth beside it to "
            "take it from"
        )
    try:
        part = torch.load(parts[0], mmap=True, weights_only=True, map_location="cpu")
        return part["output.weight"].shape[0] * len(parts)
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{params}: vocab_size is not given, and {parts[0].name} could not be read for it: "
            f"{reason}"
        ) from error
