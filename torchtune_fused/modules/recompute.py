"""Activations that are computed anew in the backward pass instead of being kept for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torchtune_fused.modules._plain import is_plain_tensor


def recompute(
    y: Tensor, function: Callable[..., Tensor], *inputs: Tensor
) -> AbstractContextManager:
    """Lets what is called inside keep ``inputs`` for its backward pass instead of ``y``.

    Meant for results that are cheap next to their memory, such as norms. Whatever else holds ``y``
    keeps it alive. Where somebody else decides what is kept (activation checkpointing and
    offloading, torch.compile) this does nothing.

    Args:
        y (Tensor): a contiguous tensor.
        function (Callable[..., Tensor]): computes the same again from ``inputs``, bit for bit;
            called without gradients.
        *inputs (Tensor): its arguments.

    Returns:
        AbstractContextManager: to be entered around the calls that read ``y``.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _others_decide():
        return nullcontext()
    # Detached, or the recipe and the graph that it belongs to would hold each other.
    recipe = _Recipe(y, partial(function, *(t.detach() for t in inputs)))
    return saved_tensors_hooks(recipe.pack, recipe.unpack)


def _others_decide() -> bool:
    autograd = torch._C._autograd
    return (
        not autograd._saved_tensors_hooks_is_enabled()
        or autograd._top_saved_tensors_default_hooks(True) is not None
    )


class _Saved(NamedTuple):
    tensor: Tensor
    version: int


class _Recipe:
    """The hooks: they put the shape of ``y``, or of a view of all of it, in its place."""

    def __init__(self, y: Tensor, function: Callable[[], Tensor]) -> None:
        # Not y itself, which these hooks would keep alive.
        self._address, self._numel, self._dtype = y.data_ptr(), y.numel(), y.dtype
        self._function = function
        self._readers = 0  # how many nodes have saved it
        self._waiting = 0  # and have not read it in this backward pass
        self._y: Tensor | None = None

    def pack(self, x: Tensor) -> _Saved | torch.Size:
        if self._is_y(x):
            self._readers += 1
            return x.shape
        # Detached, since a node that held its own output would never be freed.
        return _Saved(x.detach(), x._version)

    def unpack(self, packed: _Saved | torch.Size) -> Tensor:
        if isinstance(packed, _Saved):
            return _unchanged(packed)
        if self._y is None:
            with torch.no_grad():
                self._y = self._function()
            self._waiting = self._readers
        y = self._y.view(packed)
        self._waiting -= 1
        if self._waiting == 0:
            self._y = None
        return y

    def _is_y(self, x: Tensor) -> bool:
        return (
            is_plain_tensor(x)
            and x.numel() == self._numel
            and x.dtype == self._dtype
            and x.is_contiguous()
            and x.data_ptr() == self._address
        )


def _unchanged(saved: _Saved) -> Tensor:
    """What was saved, after the check that autograd leaves to the hooks."""
    if saved.tensor._version != saved.version:
        raise RuntimeError(
            "a tensor of shape "
            f"{list(saved.tensor.shape)} that the backward pass needs was modified in place: it is "
            f"at version {saved.tensor._version}, not {saved.version}; modify a copy of it"
        )
    return saved.tensor
