"""A contest: the same work, done by several systems."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from torchtune_fused.benchmarks.roof import Roof
from torchtune_fused.recipe_timing import seconds_of

OURS = "torchtune-fused"
TORCHTUNE = "torchtune"
COMPILED = "torchtune compiled"
TRANSFORMERS = "transformers"
LIGER = "transformers + Liger"
PEERS = (TORCHTUNE, COMPILED, TRANSFORMERS, LIGER)


@dataclass(frozen=True)
class System:
    """One way to do the work.

    Args:
        name (str): One of ``PEERS``, or a name that starts with ours.
        build (Callable[[], Callable]): Builds it; returns what is to be timed.
    """

    name: str
    build: Callable[[], Callable]

    @property
    def ours(self) -> bool:
        """Whether it is ours, so that its failure is too."""
        return self.name not in PEERS


@dataclass(frozen=True)
class Contest:
    """Work, and who does it. Nothing is built or loaded before it is held.

    Args:
        section (str): The section of the config that it belongs to.
        work (str): What is done, in the words of a table.
        tokens (int): Tokens that one run handles.
        systems (Sequence[System]): Who does it; ratios are to the first one measured.
        moved_bytes (float | None): The fewest bytes that a run must move, if that is its floor.
        flops (float | None): The floating-point operations of a run, if they are its floor.
        clock (Callable[[Callable], float]): Seconds of one run of what a system built.
        warm_up (int): Runs of each system that do not count.
    """

    section: str
    work: str
    tokens: int
    systems: Sequence[System]
    moved_bytes: float | None = None
    flops: float | None = None
    clock: Callable[[Callable], float] = seconds_of
    warm_up: int = 2

    def among(self, peers: Collection[str]) -> "Contest":
        """The same contest of our own systems and these peers."""
        return replace(self, systems=[s for s in self.systems if s.ours or s.name in peers])


@dataclass(frozen=True)
class Timing:
    """What one system took.

    Args:
        seconds (list[float]): Of one run, round by round.
        peak_bytes (int | None): The most GPU memory it held at once; None without a GPU.
    """

    seconds: list[float]
    peak_bytes: int | None


@dataclass(frozen=True)
class Outcome:
    """A contest that was held.

    Args:
        contest (Contest): It.
        in_turns (bool): Whether all systems were kept and took turns, round by round; otherwise
            each was built, measured and freed before the next, since they don't fit together.
        timings (dict[str, Timing]): By system.
        skipped (dict[str, str]): Systems that gave no figures, and why.
        roof (Roof | None): What no system can go past.
        peak_flops (float | None): FLOP/s of the device by its data sheet, if it is known.
    """

    contest: Contest
    in_turns: bool
    timings: dict[str, Timing]
    skipped: dict[str, str] = field(default_factory=dict)
    roof: Roof | None = None
    peak_flops: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON holds it: plain values, seconds, bytes and ratios."""
        contest = self.contest
        systems = {name: self._figures(timing) for name, timing in self.timings.items()}
        baseline = next((s["tokens_per_second"] for s in systems.values()), None)
        for figures in systems.values():
            figures["ratio"] = figures["tokens_per_second"] / baseline
        roof = self.roof and {
            "seconds": self.roof.seconds,
            "tokens_per_second": contest.tokens / self.roof.seconds,
            "explanation": self.roof.explanation,
        }
        return {
            "section": contest.section,
            "work": contest.work,
            "tokens": contest.tokens,
            "flops": contest.flops,
            "moved_bytes": contest.moved_bytes,
            "in_turns": self.in_turns,
            "roof": roof,
            "systems": systems,
            "skipped": self.skipped,
        }

    def _figures(self, timing: Timing) -> dict[str, Any]:
        seconds = median(timing.seconds)
        flops, peak = self.contest.flops, self.peak_flops
        return {
            "rounds": timing.seconds,
            "seconds": seconds,
            "tokens_per_second": self.contest.tokens / seconds,
            "of_roof": self.roof and self.roof.seconds / seconds,
            "mfu": flops / seconds / peak if flops and peak else None,
            "peak_bytes": timing.peak_bytes,
        }
