"""What the benchmarks of this folder share: how time is measured on one GPU."""

import random
from collections.abc import Callable, Sequence
from itertools import cycle, islice
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


def in_turns(
    contenders: dict[str, Callable[[], object]], turns: int, calls: int
) -> dict[str, list[float]]:
    """The milliseconds of a call of each contender, in each turn.

    Each turn is in a random order, as who comes before sets the clock that one starts at. Calls
    follow one that is not timed: while the GPU is at it, the launches of the others go ahead.

    Args:
        contenders (dict[str, Callable[[], object]]): By name.
        turns (int): How many are measured, after two that are not.
        calls (int): Of each contender in a turn.
    """
    times = {name: [] for name in contenders}
    for _ in range(turns + 2):
        for name in random.sample(list(contenders), len(contenders)):
            contenders[name]()
            times[name].append(milliseconds(contenders[name], calls))
    return {name: measured[2:] for name, measured in times.items()}


def called_microseconds(runs: Sequence[Callable[[], object]]) -> float:
    """Median time of a call by itself, its launches from the host included; ``runs`` take turns."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    turns = islice(cycle(runs), REPLAYS)
    return median(milliseconds(run) for run in turns) * 1e3


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
