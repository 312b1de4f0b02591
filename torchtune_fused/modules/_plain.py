"""When a fused op may stand in for calling a module: nobody could tell the difference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs ``cls.forward`` on ordinary tensors and nothing else.

    Subclasses (LoRA, quantised or parametrised layers), hooks, a ``forward`` put on the instance
    and tensor subclasses (DTensor, torchao) are not plain: such a module has to be called.
    """
    if type(module) is not cls:
        return False
    state = module.__dict__
    if (
        state["_forward_pre_hooks"]
        or state["_forward_hooks"]
        or state["_backward_pre_hooks"]
        or state["_backward_hooks"]
        or "forward" in state
        or _has_any_global_hook()
    ):
        return False
    for parameter in state["_parameters"].values():
        if parameter is not None and not is_plain_tensor(parameter):
            return False
    return True


def plain_linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of an ``nn.Linear``, if using them comes to the same as calling it."""
    if not is_plain(module, nn.Linear):
        return None
    parameters = module.__dict__["_parameters"]
    return parameters["weight"], parameters["bias"]


def is_plain_tensor(x: Tensor) -> bool:
    """Whether ``x`` is a tensor or parameter that the ops can take: no DTensor, none of torchao."""
    return type(x) is Tensor or type(x) is nn.Parameter


def adds_to(residual: Tensor, x: Tensor) -> bool:
    """Whether ``residual`` is a tensor that the ops can add to what has the form of ``x``."""
    return (
        is_plain_tensor(residual)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def in_autocast(x: Tensor) -> bool:
    """Whether autocast chooses dtypes on the device of ``x``, which it doesn't for our ops."""
    return torch.is_autocast_enabled(x.device.type)


@contextmanager
def forward_as(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within, calls of ``module`` run ``forward`` as its own: hooks and FSDP see no change."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def share_state(module: nn.Module, stock: type[nn.Module], fused: type[nn.Module]) -> nn.Module:
    """``module``, of exactly the class ``stock``, as an object of the class ``fused``.

    The two share one ``__dict__``: parameters, buffers, submodules, hooks and flags of one are
    those of the other, at any later time too.
    """
    if type(module) is not stock:
        raise TypeError(
            f"{fused.__name__}.from_stock takes a {stock.__name__}, got {type(module).__name__}"
        )
    view = fused.__new__(fused)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view
