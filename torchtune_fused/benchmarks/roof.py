"""Roofs: how fast this very machine moves bytes and multiplies large matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from torchtune_fused.recipe_timing import seconds_of


@dataclass(frozen=True)
class Roof:
    """The least time for some work.

    Args:
        seconds (float): That time.
        explanation (str): Where it comes from.
    """

    seconds: float
    explanation: str


@dataclass(frozen=True)
class Roofline:
    """What a device can do, measured when it is first asked for.

    Args:
        device (torch.device): The device.
        dtype (torch.dtype): Of the matrices.
    """

    device: torch.device
    dtype: torch.dtype

    def roof(self, moved_bytes: float | None, flops: float | None) -> Roof | None:
        """The roof of work that is bound by its bytes or its FLOPs; None if neither is given."""
        if moved_bytes is not None:
            rates = self.bandwidths
            rate = max(rates.values())
            each = ", ".join(f"{what} {speed / 1e9:.4g}" for what, speed in rates.items())
            why = f"{moved_bytes / 1e9:.3g} GB at the better of {each} GB/s"
            return Roof(moved_bytes / rate, why)
        if flops is not None:
            rate, n = self.gemm_rate, self._matrix_size
            why = (
                f"{flops / 1e12:.3g} TFLOP at {rate / 1e12:.3g} TFLOP/s, those of a {n}-cubed GEMM"
            )
            return Roof(flops / rate, why)
        return None

    @cached_property
    def bandwidths(self) -> dict[str, float]:
        """Bytes per second, read and written, of a copy and a sum of more than any cache holds."""
        size = 2**31 if self.device.type == "cuda" else 2**28
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        copied = _least_seconds(lambda: target.copy_(source))
        summed = _least_seconds(source.sum)
        return {"a long copy's": 2 * size / copied, "a long sum's": size / summed}

    @cached_property
    def gemm_rate(self) -> float:
        """FLOP/s of a product of large random matrices."""
        n = self._matrix_size
        a, b = (torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(2))
        return 2 * n**3 / _least_seconds(lambda: a @ b)

    @property
    def _matrix_size(self) -> int:
        return 8192 if self.device.type == "cuda" else 1024


def _least_seconds(run: Callable[[], object]) -> float:
    """A roof is what can be done at best: the least of many."""
    run()
    return min(seconds_of(run) for _ in range(10))
