import pytest
import torch

from torchtune_fused.benchmarks.contest import OURS, TORCHTUNE, Contest, System
from torchtune_fused.benchmarks.roof import Roofline
from torchtune_fused.benchmarks.runner import hold

MIB = 2**20


def holding(held, needed):
    """A system that holds some MiB, and needs more while it runs."""

    def build():
        own = torch.empty(held * MIB, dtype=torch.uint8, device="cuda")
        return lambda: torch.empty(needed * MIB, dtype=torch.uint8, device="cuda").copy_(own[0])

    return build


@pytest.mark.parametrize("room", [0.5, 1000], ids=["one after another", "in turns"])
def test_the_memory_of_a_system_is_its_own(room, monkeypatch):
    systems = [System(TORCHTUNE, holding(300, 200)), System(OURS, holding(100, 50))]
    contest = Contest("decode", "some work", 1, systems)
    free = int(room * 500 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    outcome = hold(contest, 3, Roofline(torch.device("cuda"), torch.bfloat16))
    assert outcome.in_turns == (room > 1)
    peaks = {name: timing.peak_bytes / MIB for name, timing in outcome.timings.items()}
    # The allocator's blocks are multiples of 512 bytes or, for these sizes, of 2 MiB.
    assert peaks == pytest.approx({TORCHTUNE: 500, OURS: 150}, abs=4)
    # Nothing of theirs is left; cuBLAS keeps its workspace from measuring the roof.
    assert torch.cuda.memory_allocated() < 100 * MIB
