"""LoRA layers on the GPU, against fp64 and plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import AdaptedLinear, lora_gated_mlp, lora_linear

HALVES = [torch.bfloat16, torch.float16]
SCALE = 2.0


def normal(*shape, dtype, scale=None):
    scale = shape[-1] ** -0.5 if scale is None else scale
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def project(x, weight, a, b):
    return F.linear(x, weight) + SCALE * F.linear(F.linear(x, a), b)


def plain_mlp(x, *tensors):
    gate, up, down = (tensors[i : i + 3] for i in (0, 3, 6))
    return project(F.silu(project(x, *gate)) * project(x, *up), *down)


def our_mlp(x, *tensors):
    layers = (AdaptedLinear(*tensors[i : i + 3]) for i in (0, 3, 6))
    return lora_gated_mlp(x, *layers, scale=SCALE)


def results(function, tensors, grad, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check(assert_as_exact, ours, plain, tensors, grad, dtype):
    truth = results(plain, tensors, grad, torch.float64)
    expected = results(plain, tensors, grad, dtype)
    found = results(ours, tensors, grad, dtype)
    for mine, theirs, exact in zip(found, expected, truth, strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [1, 3, 16, 64])
@pytest.mark.parametrize("rows, k, n", [((1,), 64, 128), ((2, 37), 72, 136), ((3, 431), 1024, 520)])
def test_linear(assert_as_exact, dtype, rank, rows, k, n):
    shapes = [(n, k), (rank, k), (n, rank)]
    tensors = [normal(*rows, k, dtype=dtype, scale=1.0), *(normal(*s, dtype=dtype) for s in shapes)]

    def ours(*tensors):
        return lora_linear(*tensors, scale=SCALE)

    check(assert_as_exact, ours, project, tensors, normal(*rows, n, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rank", [2, 8, 16, 64])
@pytest.mark.parametrize(
    "rows, dim, hidden", [((2, 37), 72, 136), ((3, 431), 1024, 2304), ((2, 1024), 512, 1000)]
)
def test_mlp(assert_as_exact, dtype, rank, rows, dim, hidden):
    shapes = [(hidden, dim), (rank, dim), (hidden, rank)] * 2
    shapes += [(dim, hidden), (rank, hidden), (dim, rank)]
    x = normal(*rows, dim, dtype=dtype, scale=1.0)
    tensors = [x, *(normal(*s, dtype=dtype) for s in shapes)]
    check(assert_as_exact, our_mlp, plain_mlp, tensors, normal(*rows, dim, dtype=dtype), dtype)


def test_memory_of_an_mlp_with_frozen_weights():
    tokens, dim, hidden, rank = 4096, 512, 4096, 16
    weights = [(hidden, dim), (hidden, dim), (dim, hidden)]
    layers = [
        AdaptedLinear(
            normal(*s, dtype=torch.bfloat16),
            normal(rank, s[1], dtype=torch.bfloat16).requires_grad_(),
            normal(s[0], rank, dtype=torch.bfloat16).requires_grad_(),
        )
        for s in weights
    ]
    x = normal(tokens, dim, dtype=torch.bfloat16).requires_grad_()
    projection = tokens * hidden * 2
    before = torch.cuda.memory_allocated()
    out = lora_gated_mlp(x, *layers, scale=SCALE)
    # gate and up are kept; their product is computed again.
    assert torch.cuda.memory_allocated() - before < 2.25 * projection
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out.backward(torch.ones_like(out))
    # On top of these: the product, and the gradients of gate and up.
    assert torch.cuda.max_memory_allocated() - before < 3.75 * projection
    assert all(layer.weight.grad is None and layer.b.grad is not None for layer in layers)
