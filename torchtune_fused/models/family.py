"""What every model family declares: how to read its config, and what its weights are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
_REQUIRED: Any = object()


class ConfigError(ValueError):
    """A model config that cannot be read, or that contradicts itself."""


class UnsupportedModelError(ConfigError):
    """A config that asks for a family, RoPE type, activation or format we do not have."""


class Fields:
    """Typed access to a config read from JSON; what is missing or nonsense is one clear error.

    Args:
        raw (Mapping[str, Any]): The parsed JSON.
        where (str): What to call its source in errors.
    """

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw = raw
        self.where = where

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A positive integer."""
        return self._get(key, default, "a positive integer", _is_positive_integer)

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """An integer that is not negative."""
        return self._get(key, default, "an integer that is not negative", _is_count)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A positive number."""
        return self._get(key, default, "a positive number", _is_positive_number)

    def fraction(self, key: str, default: Any = _REQUIRED) -> float:
        """A number from 0 to 1."""
        return self._get(
            key, default, "a number from 0 to 1", lambda v: v == 0 or _is_positive_number(v, 1)
        )

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        return self._get(key, default, "true or false", lambda v: isinstance(v, bool))

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        return self._get(key, default, "a string", lambda v: isinstance(v, str))

    def section(self, key: str) -> Fields | None:
        """A nested object, or None where it is absent."""
        value = self._get(key, None, "an object", lambda v: isinstance(v, dict))
        return None if value is None else Fields(value, f"{self.where}: {key}")

    def strings(self, key: str) -> list[str] | None:
        """A list of strings, or None where it is absent."""
        return self._get(
            key,
            None,
            "a list of strings",
            lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
        )

    def error(self, message: str) -> ConfigError:
        """An error about this config."""
        return ConfigError(f"{self.where}: {message}")

    def unsupported(self, what: str, value: object, supported: Iterable[str]) -> ConfigError:
        """An error that names what we do not have, and lists what we do."""
        return UnsupportedModelError(
            f"{self.where}: {what} {value!r} is not supported; supported: {', '.join(supported)}"
        )

    def _get(self, key: str, default: T, expected: str, valid: Callable[[Any], bool]) -> T:
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(f"the key {key!r} is missing (expected {expected})")
            return default
        if not valid(value):
            raise self.error(f"{key} is {value!r}, expected {expected}")
        return value


@dataclass(frozen=True)
class Family:
    """What sets one family of models apart from the others.

    Args:
        name (str): The ``model_type`` of its config.json.
        architecture (str): Its causal language model class in transformers.
        interleaved_rope (bool): RoPE rotates the pairs (2i, 2i+1), as in torchtune's Llama, for
            which rows of the q and k projections are permuted on load; otherwise the halves
            (i, i + d/2), as stored.
        rope_types (tuple[str, ...]): Kinds of RoPE scaling that it may ask for.
        weights (Mapping[str, str]): Name of each tensor in transformers → name in torchtune, with
            ``{layer}`` for the number of the layer.
        read (Callable[[Fields], dict[str, Any]]): The fields of
            :class:`~torchtune_fused.models.ModelConfig` that only this family knows how to read.
    """

    name: str
    architecture: str
    interleaved_rope: bool
    rope_types: tuple[str, ...]
    weights: Mapping[str, str]
    read: Callable[[Fields], dict[str, Any]]


def _with_biases(projections: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in projections.items()
        for kind in ("weight", "bias")
    }


# Which of these a model has (biases, a head of its own) is for its config to say.
DECODER_WEIGHTS = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{layer}.input_layernorm.weight": "layers.{layer}.sa_norm.scale",
    "model.layers.{layer}.post_attention_layernorm.weight": "layers.{layer}.mlp_norm.scale",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "output.weight",
    **_with_biases(
        {
            "model.layers.{layer}.self_attn.q_proj": "layers.{layer}.attn.q_proj",
            "model.layers.{layer}.self_attn.k_proj": "layers.{layer}.attn.k_proj",
            "model.layers.{layer}.self_attn.v_proj": "layers.{layer}.attn.v_proj",
            "model.layers.{layer}.self_attn.o_proj": "layers.{layer}.attn.output_proj",
            "model.layers.{layer}.mlp.gate_proj": "layers.{layer}.mlp.w1",
            "model.layers.{layer}.mlp.down_proj": "layers.{layer}.mlp.w2",
            "model.layers.{layer}.mlp.up_proj": "layers.{layer}.mlp.w3",
        }
    ),
}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive_integer(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_positive_number(value: Any, at_most: float = float("inf")) -> bool:
    # JSON as Python reads it may hold NaN and Infinity; a comparison with infinity refuses both.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= at_most and value < float("inf")
