"""Timing systems side by side."""

import statistics
import time
from collections.abc import Callable, Mapping

from torchtune import utils
from tqdm import tqdm


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that a call takes, the device's part included."""
    synchronize = utils.get_torch_device_namespace().synchronize
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def race(systems: Mapping[str, Callable[[], object]], rounds: int, title: str) -> dict[str, float]:
    """Time systems that take turns, so that a machine that slows down slows all of them.

    Args:
        systems (Mapping[str, Callable[[], object]]): What to time, by name.
        rounds (int): Each system runs so many times, after two runs to warm up.
        title (str): What the progress bar says.

    Returns:
        dict[str, float]: the median of each system's seconds.
    """
    times: dict[str, list[float]] = {who: [] for who in systems}
    for _ in tqdm(range(rounds + 2), desc=title, disable=None):
        for who, run in systems.items():
            times[who].append(seconds_of(run))
    return {who: statistics.median(seconds[2:]) for who, seconds in times.items()}
