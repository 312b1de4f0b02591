"""The kernel behind the gradients of weights, against fp64 and plain PyTorch."""

import pytest
import torch

from torchtune_fused.ops.weight_gradient import weight_gradients

ops = torch.ops.torchtune_fused
HALVES = [torch.bfloat16, torch.float16]
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is Hopper's",
)


def columns_of_wider(tokens, width, dtype):
    """A matrix inside of one, and of more rows, whose other elements are no numbers."""
    wider = torch.full((tokens + 3, width + 8), torch.nan, device="cuda", dtype=dtype)
    part = wider[:tokens, :width]
    return part.copy_(torch.randn(tokens, width, device="cuda"))


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "tokens, widths, k",
    [
        (8192, (2048, 512, 512), 2048),  # in tiles of 192 columns
        (2048, (1024, 1024), 2048),  # of 256
        (777, (1536, 1000), 3304),
        (65, (4096, 4096), 1024),
        (1, (2048, 2040), 2040),
    ],
)
def test_kernel(assert_as_exact, dtype, tokens, widths, k):
    grads = [columns_of_wider(tokens, n, dtype) for n in widths]
    x = columns_of_wider(tokens, k, dtype)
    assert ops.grouped_weight_gradients_takes(grads, x)
    found = ops.grouped_weight_gradients(grads, x)
    for grad, mine in zip(grads, found, strict=True):
        truth = grad.double().t() @ x.double()
        assert_as_exact(mine, grad.t() @ x, truth, dtype)
    again = ops.grouped_weight_gradients(grads, x)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize(
    "tokens, widths, k, dtype",
    [
        (300, (576, 192, 192), 576, torch.bfloat16),  # leaves most of the GPU idle
        (300, (2048,), 2048, torch.bfloat16),  # a single one
        (256, (1024, 1024), 2047, torch.bfloat16),
        (256, (1024, 1024), 2048, torch.float32),
        (0, (1024, 1024), 2048, torch.bfloat16),
    ],
)
def test_cases_without_kernel(assert_as_exact, tokens, widths, k, dtype):
    grads = [torch.randn(tokens, n, device="cuda").to(dtype) for n in widths]
    x = torch.randn(tokens, k, device="cuda").to(dtype)
    assert not ops.grouped_weight_gradients_takes(grads, x)
    needed = [i != 1 for i in range(len(widths))]
    for grad, need, mine in zip(grads, needed, weight_gradients(grads, x, needed), strict=True):
        if need:
            truth = grad.double().t() @ x.double()
            assert_as_exact(mine, grad.t() @ x, truth, dtype)
        else:
            assert mine is None
