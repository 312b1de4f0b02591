"""Fused CUDA kernels for torchtune models, by model surgery.

The public names are imported on first use, so that ``torchtune_fused.ops`` can be used by a
program that does not have torchtune.
"""

from importlib import import_module

_PUBLIC = {
    "fused_model": "torchtune_fused.surgery",
    "patch_model": "torchtune_fused.surgery",
    "unpatch_model": "torchtune_fused.surgery",
    "register_builder": "torchtune_fused.surgery",
    "Shard": "torchtune_fused.shard",
    "plan_shards": "torchtune_fused.shard",
    "ShardTransformerDecoder": "torchtune_fused.shard",
    "load_model_config": "torchtune_fused.models",
    "load_model_weights_torchtune": "torchtune_fused.checkpoint",
    "generate": "torchtune_fused.generation",
    "AdamW": "torchtune_fused.training.adamw",
    "MultiLayerPreceptron": "torchtune_fused.modules",
    "MultiLayerPerceptron": "torchtune_fused.modules",
    "OptimizedAttention": "torchtune_fused.modules",
    "fused_attention": "torchtune_fused.ops",
    "fused_mlp": "torchtune_fused.ops",
}
_SUBPACKAGES = ("modules", "ops")

__all__ = [*_PUBLIC, *_SUBPACKAGES]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
