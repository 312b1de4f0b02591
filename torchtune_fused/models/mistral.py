"""Mistral: Llama with one sliding window over all layers, or none."""

from typing import Any

from torchtune_fused.models.family import DECODER_WEIGHTS, Family, Fields


def _read(fields: Fields) -> dict[str, Any]:
    window = fields.integer("sliding_window", None)
    return {"sliding_windows": (window,) * fields.integer("num_hidden_layers")}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    interleaved_rope=True,
    rope_types=("default", "linear"),
    weights=DECODER_WEIGHTS,
    read=_read,
)
