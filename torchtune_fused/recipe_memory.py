"""The memory that a run has needed."""

import resource
import sys

import torch
import torch.distributed as dist


def peak_memory(device: torch.device, processes: int) -> int:
    """Most bytes that one of the processes has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if processes > 1:
        largest = torch.tensor(peak)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        peak = int(largest)
    return peak
