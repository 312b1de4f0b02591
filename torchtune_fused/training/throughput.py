"""How fast a run is, and how much of the hardware that is."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from torchtune_fused.models import ModelConfig
from torchtune_fused.training.processes import Processes

# Dense bf16 TFLOP/s with fp32 accumulation, of the vendor's data sheets; the first name found in
# the device's counts.
_PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "A6000": 155,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations per second that a device can do at best.

    Args:
        device (torch.device): The device.
        dtype (torch.dtype): Dtype of the matrices.

    Returns:
        float | None: None for CPUs, GPUs that are not in the table, and dtypes of 32 bits.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for model, peak in _PEAK_TFLOPS.items() if model in name), None)


def training_flops(
    config: ModelConfig, shape: Sequence[int], *, adapter_parameters: int | None = None
) -> float:
    """Floating-point operations that training on a batch takes, forward and backward.

    Two per weight and token in each of three products: the output, and the gradients of input and
    weight, of which frozen weights spare the last; and those of causal attention, for which a row
    counts as one document. The embedding is a look-up; what is computed twice counts once. Source:
    PaLM (Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311), appendix B.

    Args:
        config (ModelConfig): The model.
        shape (Sequence[int]): ``[b, s]``, rows and tokens in each.
        adapter_parameters (int | None): With LoRA, the number of its parameters; None if all
            weights are trained.

    Returns:
        float: the operations.
    """
    rows, length = shape
    weights = config.num_layers * config.layer_parameters() + config.embed_dim * config.vocab_size
    per_token = 6 * weights
    if adapter_parameters is not None:
        per_token = 4 * weights + 6 * adapter_parameters
    # Scores and their product with the values: 4 * length each way, halved by the causal mask.
    attention = 3 * 2 * length * config.num_heads * config.head_dim * config.num_layers
    return float(rows * length * (per_token + attention))


class Speedometer:
    """Tokens per second of all processes and, where the GPU's peak is known, their share of it.

    Args:
        config (ModelConfig): The model.
        model (nn.Module): The model, before its parameters are spread over the processes.
        processes (Processes): Who trains it.
    """

    def __init__(self, config: ModelConfig, model: nn.Module, processes: Processes) -> None:
        self._config = config
        self._processes = processes
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        all_trained = len(trained) == len(list(model.parameters()))
        self._adapter_parameters = None if all_trained else sum(trained)
        self._peak = peak_flops(processes.device, next(model.parameters()).dtype)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted, and measure from now on."""
        self._start = time.perf_counter()
        self._done = torch.zeros(2, dtype=torch.float64)

    def count(self, shape: Sequence[int]) -> None:
        """Count a batch ``[b, s]`` of this process, padding included."""
        rows, length = shape
        flops = training_flops(self._config, shape, adapter_parameters=self._adapter_parameters)
        self._done += torch.tensor([rows * length, flops], dtype=torch.float64)

    def read(self) -> dict[str, float]:
        """The speed since the last reading; all ranks call it."""
        seconds = time.perf_counter() - self._start
        tokens, flops = (self._processes.sum(self._done) / seconds).tolist()
        self.restart()
        speed = {"tokens_per_second": tokens}
        if self._peak is not None:
            speed["mfu"] = flops / (self._peak * self._processes.count)
        return speed
