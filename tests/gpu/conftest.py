"""What the GPU tests share: the kernels, and the rule for how large an error may be."""

from pathlib import Path

import pytest
import torch

import torchtune_fused.ops  # noqa: F401, the kernels are implementations of its ops
from torchtune_fused.build import load_kernels


def pytest_collection_modifyitems(items):
    # The hook is called with the tests of all folders.
    for item in (item for item in items if Path(__file__).parent in item.path.parents):
        item.add_marker(pytest.mark.gpu)  # skipped by tests/conftest.py without a GPU


@pytest.fixture(scope="session", autouse=True)
def kernels():
    if torch.cuda.is_available():
        assert load_kernels(), "the kernels are not usable; see `torchtune-fused doctor`"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def assert_as_exact():
    """The rule for a result in low precision, against an fp64 truth.

    The error may be at most twice that of plain PyTorch in the same precision, in the largest
    element and in the norm. One rounding of the largest value is allowed on top: where plain
    PyTorch happens to hit the truth, a correctly rounded result may still be half a unit off.
    """

    def check(out, plain, truth, dtype):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        assert out.isfinite().all()
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * norm(plain.double() - truth) + rounding / 2
            assert norm(out.double() - truth) <= allowed

    return check
