"""Holding a contest: every system built, warmed up, timed, and freed."""

import gc
import traceback
from collections.abc import Callable

import torch
from tqdm import tqdm

from torchtune_fused.benchmarks.contest import Contest, Outcome, System, Timing
from torchtune_fused.benchmarks.roof import Roofline
from torchtune_fused.flops import peak_flops


def hold(contest: Contest, rounds: int, roofline: Roofline) -> Outcome:
    """Time the systems of a contest.

    They take turns, so that a machine that slows down slows all of them; where so many do not fit
    into the GPU's memory together, each is built, timed and freed before the next one.

    Args:
        contest (Contest): The contest.
        rounds (int): Each system is timed so many times.
        roofline (Roofline): Of the device that they run on.

    Returns:
        Outcome: what each took. A system that can't be built, fails or runs out of memory is in
        ``skipped``; one of ours leaves its traceback on stderr.
    """
    roof = roofline.roof(contest.moved_bytes, contest.flops)
    _collect()
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else float("inf")
    contestants = [_Contestant(system, contest) for system in contest.systems]
    in_turns = None
    with tqdm(total=len(contestants) * rounds, desc=contest.work, disable=None) as progress:
        for contestant in contestants:
            progress.set_postfix_str(f"building {contestant.system.name}")
            contestant.start()
            if in_turns is None and contestant.skipped is None:
                in_turns = contestant.peak_bytes * len(contestants) < 0.9 * room
            if not in_turns:
                for _ in range(rounds):
                    contestant.run_round(progress)
                contestant.free()
        if in_turns:
            for _ in range(rounds):
                for contestant in contestants:
                    contestant.run_round(progress)
            for contestant in contestants:
                contestant.free()
    return Outcome(
        contest,
        in_turns=bool(in_turns),
        timings={c.system.name: c.timing for c in contestants if c.skipped is None},
        skipped={c.system.name: c.skipped for c in contestants if c.skipped is not None},
        roof=roof,
        peak_flops=peak_flops(roofline.device),
    )


class _Contestant:
    """A system under way, and what of the GPU's memory is its own."""

    def __init__(self, system: System, contest: Contest) -> None:
        self.system = system
        self.skipped: str | None = None
        self.peak_bytes = 0
        self._contest = contest
        self._run: Callable | None = None
        self._held = 0
        self._seconds: list[float] = []

    @property
    def timing(self) -> Timing:
        return Timing(self._seconds, self.peak_bytes or None)

    def start(self) -> None:
        before = _allocated()
        self._attempt(self._build)
        self._held = _allocated() - before

    def run_round(self, progress: tqdm) -> None:
        progress.set_postfix_str(self.system.name)
        if self.skipped is None:
            self._attempt(self._measure)
        progress.update()

    def free(self) -> None:
        self._run = None
        torch.compiler.reset()
        _collect()

    def _build(self) -> None:
        before = _allocated()
        _reset_peak()
        self._run = self.system.build()
        for _ in range(self._contest.warm_up):
            self._contest.clock(self._run)
        self.peak_bytes = _peak() - before

    def _measure(self) -> None:
        others = _allocated() - self._held
        _reset_peak()
        self._seconds.append(self._contest.clock(self._run))
        peak = _peak() - others
        self.peak_bytes = max(self.peak_bytes, peak) if len(self._seconds) > 1 else peak

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
            return
        except torch.OutOfMemoryError:
            self.skipped = "out of memory"
        except ImportError as error:
            self.skipped = f"not installed: {_one_line(error)}"
        except Exception as error:  # whatever one system trips over, the others have their figures
            self.skipped = f"{type(error).__name__}: {_one_line(error)}"
            if self.system.ours:
                traceback.print_exc()
        self._run = None
        _collect()


def _one_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
