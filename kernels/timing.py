"""What the benchmarks of this folder share: how time is measured on one GPU."""

from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median

import torch

REPLAYS = 20


def milliseconds(run: Callable[[], object], calls: int = 1) -> float:
    """Time that the GPU takes for what a call of ``run`` queues; waits until all are done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def called_microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """Median time of a call by itself, its launches from the host included; ``runs`` take turns."""
    turns = cycle(runs)
    for _ in runs:
        next(turns)()
    torch.cuda.synchronize()
    return median(milliseconds(next(turns)) for _ in range(REPLAYS)) * 1e3


def captured_microseconds(run: Callable[[], object], launches: int = 1) -> float:
    """Median time of a replay of ``run``, captured as a CUDA graph, divided by ``launches``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what compiles or picks an algorithm does so before the capture
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(10):
        graph.replay()
    return median(milliseconds(graph.replay) for _ in range(REPLAYS)) * 1e3 / launches
