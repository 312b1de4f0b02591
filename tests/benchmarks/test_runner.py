import pytest
import torch

from torchtune_fused.benchmarks.contest import OURS, TORCHTUNE, Contest, System
from torchtune_fused.benchmarks.roof import Roofline
from torchtune_fused.benchmarks.runner import hold

CPU = Roofline(torch.device("cpu"), torch.float32)


def contest(**builds):
    systems = [System(name, build) for name, build in builds.items()]
    return Contest("decode", "some work", 1, systems, clock=lambda run: run(), warm_up=1)


def test_systems_take_turns_after_their_warm_up():
    calls = []

    def system(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return lambda: run

    outcome = hold(contest(torchtune=system("a"), transformers=system("b")), 3, CPU)
    assert "".join(calls) == "ab" + 3 * "ab"
    assert outcome.in_turns
    assert outcome.timings["torchtune"].seconds == [3, 5, 7]
    assert outcome.timings["transformers"].seconds == [4, 6, 8]


def failing(error, *, after=0):
    """A system that fails when built or, after so many runs, while it runs."""
    runs = iter(range(after))

    def run():
        if next(runs, None) is None:
            raise error
        return 1.0

    def build():
        if not after:
            raise error
        return run

    return build


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'x'"), "not installed: No module named 'x'"),
        (torch.OutOfMemoryError("lots of it"), "out of memory"),
        (RuntimeError("line one\nline two"), "RuntimeError: line one"),
    ],
)
def test_a_peer_that_fails_at_any_time_is_skipped(error, reason, after):
    fine = lambda: lambda: 1.0  # noqa: E731
    systems = {TORCHTUNE: failing(error, after=after), OURS: fine}
    outcome = hold(contest(**systems), 3, CPU)
    assert outcome.skipped == {TORCHTUNE: reason}
    assert outcome.timings.keys() == {OURS}
    assert outcome.as_dict()["systems"][OURS]["ratio"] == 1


def test_our_own_failure_leaves_a_traceback(capsys):
    outcome = hold(contest(**{OURS: failing(RuntimeError("a bug"))}), 3, CPU)
    assert outcome.skipped == {OURS: "RuntimeError: a bug"}
    assert outcome.as_dict()["systems"] == {}
    assert "Traceback" in capsys.readouterr().err
