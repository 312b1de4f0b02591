"""Computing in fewer bits than the callers of a model use."""

import torch
from torch import nn
from torchtune.modules import KVCache

from torchtune_fused.modules import FusedAttention, FusedFeedForward

# Kept in a module's __dict__, so that it goes with copies: the dtypes its parameters had.
_DTYPES = "_torchtune_fused_dtypes"


def check_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Raises a ValueError if the parameters of a model can't be cast to ``dtype``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"compute_dtype must be a floating-point torch.dtype, got {dtype!r}")
    for name, module in model.named_modules():
        if isinstance(module, KVCache) and module.k_cache.dtype != dtype:
            raise ValueError(
                f"{name} is {module.k_cache.dtype}, compute_dtype is {dtype}: set the KV caches up "
                "after patching (delete_kv_caches(model) removes them)"
            )


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts every floating-point parameter in place; buffers, such as angles, keep their dtype."""
    for module in model.modules():
        had = vars(module).setdefault(_DTYPES, {})
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                had.setdefault(name, parameter.dtype)
        if isinstance(module, (FusedAttention, FusedFeedForward)):
            module.compute_dtype = dtype
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def restore_parameters(model: nn.Module) -> None:
    """Casts parameters back to the dtypes they had before `cast_parameters`."""
    for module in model.modules():
        for name, dtype in vars(module).pop(_DTYPES, {}).items():
            parameter = module._parameters[name]
            parameter.data = parameter.data.to(dtype)
        vars(module).pop("compute_dtype", None)
