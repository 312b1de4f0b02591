"""How fast a run is, and how much of the hardware that is."""

import time
from collections import Counter

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_fused.flops import peak_flops, training_flops
from torchtune_fused.training.processes import Processes


class Speedometer:
    """Tokens per second of all processes and, where the GPU's peak is known, MFU.

    A row counts as one document, also if it is packed with several.

    Args:
        model (TransformerDecoder): The model.
        processes (Processes): Who trains it.
    """

    def __init__(self, model: TransformerDecoder, processes: Processes) -> None:
        self._model = model
        self._processes = processes
        # That of 16-bit matrices.
        wide = next(model.parameters()).dtype.itemsize > 2
        self._peak = None if wide else peak_flops(processes.device)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and measure from now on."""
        self._batches: Counter[torch.Size] = Counter()
        self._start = time.perf_counter()

    def count(self, tokens: Tensor) -> None:
        """Count a batch ``[b, s]`` of this process, padding included."""
        self._batches[tokens.shape] += 1

    def read(self) -> dict[str, float]:
        """The speed since the last reading; all ranks call it."""
        seconds = time.perf_counter() - self._start
        work = [shape.numel() * times for shape, times in self._batches.items()]
        flops = [
            training_flops(self._model, *s) * n for s, n in self._batches.items() if self._peak
        ]
        done = torch.tensor([sum(work), sum(flops)], dtype=torch.float64)
        tokens_per_second, flops_per_second = (self._processes.sum(done) / seconds).tolist()
        self.restart()
        speed = {"tokens_per_second": tokens_per_second}
        if self._peak is not None:
            speed["mfu"] = flops_per_second / (self._peak * self._processes.count)
        return speed
