"""The processes of a run: one alone, or the ranks that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder


class Processes:
    """What a rank has to know about the others, and does together with them.

    Args:
        count (int): How many there are.
        rank (int): Number of this one.
        device (torch.device): The device of this one.
    """

    def __init__(self, count: int, rank: int, device: torch.device) -> None:
        self.count = count
        self.rank = rank
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this rank does what only one of them must do."""
        return self.rank == 0

    @property
    def loading_device(self) -> torch.device:
        """Where to load the weights to: what is to be spread over GPUs, first to the CPU."""
        return self.device if self.count == 1 else torch.device("cpu")

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; one on the CPU does not wait for the GPU."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.count > 1:
            dist.barrier()

    def shard(self, model: TransformerDecoder) -> None:
        """Spread a model's parameters over the ranks (FSDP2), layer by layer, in place.

        A layer is put together when it runs, so that its modules, fused ones too, see ordinary
        tensors. On a GPU, the parameters may come from the CPU: of each layer, only this rank's
        part stays on the GPU. Source: PyTorch FSDP (Zhao et al., 2023,
        https://arxiv.org/abs/2304.11277).
        """
        mesh = dist.init_device_mesh(self.device.type, (self.count,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def gather(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with whole tensors on the CPU; all ranks call it, and the first has it.

        Args:
            state (dict[str, Tensor]): This rank's part of it.

        Returns:
            dict[str, Tensor]: the whole of it on the first rank, nothing on the others.
        """
        whole = {}
        for name, tensor in state.items():
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_first:
                whole[name] = tensor.cpu()
        return whole


@contextmanager
def start_processes(device: torch.device) -> Iterator[Processes]:
    """Join the other ranks, if torchrun started any, and leave them at the end.

    Args:
        device (torch.device): The device of this one. GPUs talk through NCCL, CPUs through gloo.

    Yields:
        Processes: all of them.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(count, rank, device)
    finally:
        if count > 1:
            dist.destroy_process_group()
