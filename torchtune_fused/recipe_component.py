"""The components that a config names, built with errors of one line."""

from typing import Any

from omegaconf import DictConfig
from torchtune import config


def instantiate(
    key: str, component: DictConfig | None, *args: Any, having: tuple[str, ...] = (), **kwargs: Any
) -> Any:
    """Build a component, like ``torchtune.config.instantiate``.

    Args:
        key (str): The config's key that names it.
        component (DictConfig | None): Its section.
        *args (Any): Arguments that the config doesn't hold.
        having (tuple[str, ...]): Attributes that it must have to be of use.
        **kwargs (Any): More arguments that the config doesn't hold.

    Returns:
        Any: What it builds.

    Raises:
        ValueError: If the section names no component, or one that is not of use, or arguments are
            wrong.
        InstantiationError: If there is no such component.
    """
    path = component.get("_component_") if isinstance(component, DictConfig) else None
    if not (isinstance(path, str) and path):
        raise ValueError(f"{key} must name a component, got {path or component!r}")
    try:
        built = config.instantiate(component, *args, **kwargs)
    except (ImportError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{key}: {error}") from error
    for attribute in having:
        if not hasattr(built, attribute):
            raise ValueError(f"{key}: {path} is none: it has no {attribute}")
    return built
