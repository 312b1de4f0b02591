"""When a fused op may stand in for calling a module: nobody could tell the difference."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs ``cls.forward`` on ordinary tensors and nothing else.

    Subclasses (LoRA, quantised or parametrised layers), hooks, a ``forward`` put on the instance
    and tensor subclasses (DTensor, torchao) are not plain: such a module has to be called.
    """
    if (
        type(module) is not cls
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    ):
        return False
    for parameter in module._parameters.values():
        if type(parameter) is not nn.Parameter and parameter is not None:
            return False
    return True


def is_plain_tensor(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary tensor or parameter, which the fused ops can take."""
    return type(x) is Tensor or type(x) is nn.Parameter


def in_autocast(x: Tensor) -> bool:
    """Whether autocast chooses dtypes on the device of ``x``, which it doesn't for our ops."""
    return torch.is_autocast_enabled(x.device.type)


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
