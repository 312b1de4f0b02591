"""A config component: any torchtune model builder, with its model patched."""

from importlib import import_module
from typing import Any

from torch import nn
from torchtune.utils import get_logger

from torchtune_fused.surgery.patch import patch_model

_log = get_logger("INFO")


def fused_model(builder: str, **kwargs: Any) -> nn.Module:
    """Build a torchtune model and patch it: what a config names to make a stock recipe run fused.

    In the YAML of any torchtune recipe, the model's builder moves one line down::

        model:
          _component_: torchtune_fused.fused_model
          builder: torchtune.models.llama3_2.llama3_2_1b

    Args:
        builder: Dotted path of a function that returns a model, such as
            ``torchtune.models.llama3_2.lora_llama3_2_1b``.
        **kwargs: The builder's own arguments.

    Returns:
        The model, patched; what was swapped and what was declined, and why, is logged.

    Raises:
        ValueError: If ``builder`` is not the dotted path of something callable.
    """
    module_name, _, name = builder.rpartition(".")
    try:
        build = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"builder {builder!r} can't be imported: {error}") from error
    if not callable(build):
        raise ValueError(f"builder {builder!r} is not callable")
    model = build(**kwargs)
    _log.info("%s: %s", builder, patch_model(model))
    return model
