"""Values on their way from the GPU to the host."""

import torch
from torch import Tensor


class HostValue:
    """A value that is copied to the host as soon as it is known, while the GPU goes on.

    ``Tensor.item`` would wait for all the work queued so far; this waits for the value alone.

    Args:
        value (Tensor): One element, on any device.
    """

    def __init__(self, value: Tensor) -> None:
        self._copied = None
        if value.is_cuda:
            stream = torch.cuda.current_stream(value.device)
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            value = host.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(stream)
        self._value = value

    def get(self) -> bool | int | float:
        """The value, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.item()
