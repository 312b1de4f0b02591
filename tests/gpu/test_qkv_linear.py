"""The projections of queries, keys and values on the GPU, against fp64 and plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import AdaptedLinear, qkv_linear

HALVES = [torch.bfloat16, torch.float16]
SCALE = 2.0


def plain(x, *tensors):
    outputs = []
    for weight, a, b in zip(*(tensors[i::3] for i in range(3)), strict=True):
        out = F.linear(x, weight)
        outputs.append(out if a is None else out + SCALE * F.linear(F.linear(x, a), b))
    return torch.cat(outputs, dim=-1)


def ours(x, *tensors):
    layers = (AdaptedLinear(*tensors[i : i + 3]) for i in (0, 3, 6))
    return torch.cat(qkv_linear(x, *layers, scale=SCALE), dim=-1)


def results(function, tensors, grad, dtype):
    leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("ranks", [(0, 0, 0), (16, 16, 16), (8, 0, 16), (3, 1, 64)])
@pytest.mark.parametrize(
    "rows, dim, widths",
    [
        ((1,), 64, (128, 64, 64)),
        ((2, 37), 72, (136, 40, 40)),
        ((3, 1031), 1024, (1032, 520, 512)),
        ((1, 1024), 512, (511, 256, 256)),
    ],
)
def test_output_and_gradients(assert_as_exact, dtype, ranks, rows, dim, widths):
    tensors = [torch.randn(*rows, dim, device="cuda").to(dtype)]
    for n, rank in zip(widths, ranks, strict=True):
        for shape in ((n, dim), (rank, dim), (n, rank)):
            scale = max(shape[-1], 1) ** -0.5
            made = (torch.randn(shape, device="cuda") * scale).to(dtype)
            tensors.append(made if made.numel() else None)
    grad = torch.randn(*rows, sum(widths), device="cuda").to(dtype)
    truth = results(plain, tensors, grad, torch.float64)
    expected = results(plain, tensors, grad, dtype)
    for mine, theirs, exact in zip(
        results(ours, tensors, grad, dtype), expected, truth, strict=True
    ):
        assert_as_exact(mine, theirs, exact, dtype)
