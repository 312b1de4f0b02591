"""Qwen2 and Qwen2.5: biases on q, k and v; RoPE over halves; windows on some layers."""

from typing import Any

from torchtune_fused.models.family import DECODER_WEIGHTS, Family, Fields


def window_per_layer(fields: Fields) -> tuple[int | None, ...]:
    """Each layer's sliding window: by ``layer_types``, or from ``max_window_layers`` upwards."""
    num_layers = fields.integer("num_hidden_layers")
    window = None
    if fields.flag("use_sliding_window", False):
        window = fields.integer("sliding_window", None)
    first = fields.count("max_window_layers", 28)
    types = fields.strings("layer_types")
    if types is None:
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(types) != num_layers:
        raise fields.error(f"layer_types has {len(types)} entries for {num_layers} layers")
    windows = {"full_attention": None, "sliding_attention": window}
    for kind in types:
        if kind not in windows:
            raise fields.unsupported("layer type", kind, windows)
    return tuple(windows[kind] for kind in types)


def _read(fields: Fields) -> dict[str, Any]:
    return {"attn_bias": True, "sliding_windows": window_per_layer(fields)}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    interleaved_rope=False,
    rope_types=("default",),
    weights=DECODER_WEIGHTS,
    read=_read,
)
