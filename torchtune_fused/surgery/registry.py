"""Which torchtune module is replaced by what: builders, ours and those of other packages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from torch import nn

#: Entry-point group of packages with builders of their own: each entry names a module to import,
#: which calls `register_builder`.
ENTRY_POINT_GROUP = "torchtune_fused.builders"


@dataclass(frozen=True)
class Decline:
    """A builder's answer for a module that it leaves as it is.

    Args:
        reason (str): why, as a phrase that can follow the module's name in a report.
    """

    reason: str


Builder = Callable[[nn.Module], nn.Module | Decline]

_builders: dict[type[nn.Module], Builder] = {}


def register_builder(module_class: type[nn.Module]) -> Callable[[Builder], Builder]:
    """Registers the decorated function as the builder for a class of modules.

    A builder gets a module of exactly that class and returns its replacement, or a `Decline`. It
    must not change the module. The replacement takes the same calls, gives the same results and has
    the same state-dict keys and shapes. One that shares the module's ``__dict__``, as ours do, is
    swapped in by changing the module's class.

    Args:
        module_class (type[nn.Module]): the class to replace; subclasses of it are not.

    Returns:
        Callable[[Builder], Builder]: decorator which gives the builder back unchanged.

    Raises:
        ValueError: if another builder is registered for the class.
    """

    def register(builder: Builder) -> Builder:
        known = _builders.get(module_class)
        if known is not None and _name(known) != _name(builder):
            raise ValueError(
                f"{module_class.__name__} has a builder already, {_name(known)}; "
                f"{_name(builder)} can't be registered for it too"
            )
        _builders[module_class] = builder
        return builder

    return register


def all_builders() -> Mapping[type[nn.Module], Builder]:
    """The builders by class, those of installed packages included.

    Raises:
        ImportError: if a package's entry point can't be loaded.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry_point.load()
        except Exception as error:
            raise ImportError(
                f"the entry point {entry_point.name} = {entry_point.value} in the group "
                f"{ENTRY_POINT_GROUP} can't be loaded: {error}"
            ) from error
    return _builders


def _name(builder: Builder) -> str:
    return f"{builder.__module__}.{builder.__qualname__}"
