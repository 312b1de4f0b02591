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
    Where larger terms cancel out, ``terms`` says how large their sum would be without signs: it is
    rounded in fp32 (in fp64 for an fp64 result) at least once.
    """

    def check(out, plain, truth, dtype, terms=0.0):
        rounding = torch.finfo(dtype).eps * truth.abs().max()
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        rounding = rounding + 2 * torch.finfo(sums).eps * terms
        assert out.isfinite().all()
        for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
            allowed = 2 * norm(plain.double() - truth) + rounding / 2
            assert norm(out.double() - truth) <= allowed

    return check


@pytest.fixture(scope="session")
def plain_attention():
    """Attention in the precision of q throughout, scores and probabilities included."""

    def seen_keys(s, s_kv, mask, causal, window, documents):
        own = torch.arange(s_kv - s, s_kv, device="cuda").unsqueeze(1)
        keys = torch.arange(s_kv, device="cuda")
        seen = torch.ones(1, 1, s, s_kv, dtype=torch.bool, device="cuda")
        if mask is not None:
            seen = seen & (mask if mask.ndim == 4 else mask.unsqueeze(1))
        if causal:
            seen = seen & (keys <= own)
        if window is not None:
            seen = seen & (own - keys < window)
        if documents is not None:
            first = documents[0].unsqueeze(1)
            seen = seen & (first.unsqueeze(-1) == first.unsqueeze(-2))
        return seen

    def attention(
        q, k, v, mask=None, causal=False, window=None, documents=None, scale=None, softcap=None
    ):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = seen_keys(q.shape[2], k.shape[2], mask, causal, window, documents)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) * seen.any(-1, keepdim=True) @ v

    return attention
