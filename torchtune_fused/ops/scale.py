"""Multiplying a tensor by a factor that only the device knows."""

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, at_least_fp32, call, define_op


def scale_(x: Tensor, factor: Tensor) -> None:
    """Multiplies ``x`` in place, in fp32 and rounded once; a factor of 1 costs no pass over it.

    ``x.mul_(factor)`` would round the factor to the dtype of ``x`` first.

    Args:
        x (Tensor): contiguous, of any floating dtype.
        factor (Tensor): one element, fp32 (fp64 for fp64 ``x``).
    """
    call("scale_", x, factor)


@define_op("scale_(Tensor(a!) x, Tensor factor) -> ()")
def _reference(x, factor):
    x.copy_(at_least_fp32(x) * factor)


@torch.library.register_fake("torchtune_fused::scale_", lib=LIBRARY)
def _(x, factor):
    pass
