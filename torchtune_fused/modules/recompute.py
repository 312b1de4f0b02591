"""Activations that are computed anew in the backward pass instead of being kept for it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


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


class _Recipe:
    """The hooks: they put the shape of ``y``, or of a view of all of it, in its place."""

    def __init__(self, y: Tensor, function: Callable[[], Tensor]) -> None:
        # Not y itself, which these hooks would keep alive.
        self._address, self._numel, self._dtype = y.data_ptr(), y.numel(), y.dtype
        self._function = function
        self._readers = 0  # how many nodes have saved it
        self._waiting = 0  # and have not read it in this backward pass
        self._y: Tensor | None = None

    def pack(self, x: Tensor) -> torch.Size | tuple[Tensor, int]:
        if self._is_y(x):
            self._readers += 1
            return x.shape
        # A node that held its own output, with the way back to itself, would never be freed.
        return x if x.is_leaf else x.detach(), x._version

    def unpack(self, packed: torch.Size | tuple[Tensor, int]) -> Tensor:
        if type(packed) is tuple:
            return _unchanged(*packed)
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
        # Most are parameters: what tells them apart comes first.
        return (
            type(x) is Tensor
            and x.data_ptr() == self._address
            and x.numel() == self._numel
            and x.dtype == self._dtype
            and x.is_contiguous()
        )


def _unchanged(x: Tensor, version: int) -> Tensor:
    """What was saved, after the check that autograd leaves to the hooks."""
    if x._version != version:
        raise RuntimeError(
            "a tensor of shape "
            f"{list(x.shape)} that the backward pass needs was modified in place: "
            f"it is at version {x._version}, not {version}; modify a copy of it"
        )
    return x
