"""The gated MLP and its kernels on the GPU, against fp64 and plain PyTorch."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import gated_mlp
from torchtune_fused.ops.gated_activation import gated_activation, gated_activation_backward

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
HALVES = [torch.bfloat16, torch.float16]


def normal(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def product_and_gradients(gate, up, grad, activation):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    hidden = ACTIVATIONS[activation](gate) * up
    return hidden.detach(), *torch.autograd.grad(hidden, (gate, up), grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 4096), (131, 1000)])
@pytest.mark.parametrize("offset", [0, 1])
def test_activation(assert_as_exact, activation, dtype, shape, offset):
    # An offset of one element keeps the kernels from reading 16 bytes at a time.
    gate, up, grad = (
        normal(offset + torch.Size(shape).numel(), dtype=dtype, scale=4.0)[offset:].view(shape)
        for _ in range(3)
    )
    truth = product_and_gradients(gate.double(), up.double(), grad.double(), activation)
    plain = product_and_gradients(gate, up, grad, activation)
    kept = gate.clone(), up.clone()
    found = [gated_activation(gate, up, activation)]
    hidden, *gradients = gated_activation_backward(
        grad.clone(), gate, up, activation, need_hidden=True
    )
    assert torch.equal(hidden, found[0])
    assert torch.equal(gate, kept[0]) and torch.equal(up, kept[1])
    for mine, theirs, exact in zip([*found, *gradients], plain, truth, strict=True):
        if dtype in HALVES:
            assert_as_exact(mine, theirs, exact, dtype)
        else:
            # Plain PyTorch is no lower precision here. In GELU's slope, 1 - sigmoid is a rounding
            # off, times a polynomial of up to 30 where it matters.
            atol = 64 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1).item()
            torch.testing.assert_close(mine.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite_as_in_pytorch(dtype, activation):
    values = torch.tensor([-torch.inf, torch.inf, torch.nan, -6e4, 6e4, 0.0], device="cuda")
    gate, up = (t.flatten().to(dtype) for t in torch.meshgrid(values, values, indexing="ij"))
    plain = ACTIVATIONS[activation](gate) * up
    assert torch.equal(gated_activation(gate, up, activation).isnan(), plain.isnan())


def mlp_and_gradients(tensors, grad, activation, dtype):
    x, w_gate, w_up, w_down, *biases = leaves = [
        t.detach().to(dtype).requires_grad_() for t in tensors
    ]
    b_gate, b_up, b_down = biases or (None, None, None)
    hidden = ACTIVATIONS[activation](F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
    out = F.linear(hidden, w_down, b_down)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    "rows, dim, hidden",
    # From 512 rows on, Hopper has a kernel for sizes that are multiples of 8.
    [
        ((1,), 64, 128),
        ((2, 37), 72, 136),
        ((2, 300), 100, 36),
        ((3, 431), 1024, 2304),
        ((2, 1024), 2048, 1000),
    ],
)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_output_and_gradients(assert_as_exact, dtype, bias, rows, dim, hidden, activation):
    shapes = [(*rows, dim), (hidden, dim), (hidden, dim), (dim, hidden)]
    shapes += [(hidden,), (hidden,), (dim,)] if bias else []
    tensors = [normal(*s, dtype=dtype, scale=s[-1] ** -0.5) for s in shapes]
    tensors[0] = tensors[0] * dim**0.5
    grad = normal(*rows, dim, dtype=dtype)
    truth = mlp_and_gradients(tensors, grad, activation, torch.float64)
    plain = mlp_and_gradients(tensors, grad, activation, dtype)
    leaves = [t.requires_grad_() for t in tensors]
    out = gated_mlp(*leaves, activation=activation)
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for mine, theirs, exact in zip(found, plain, truth, strict=True):
        assert_as_exact(mine, theirs, exact, dtype)
    with torch.no_grad():
        assert torch.equal(gated_mlp(*leaves, activation=activation), found[0])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows, dim, hidden", [((2, 37), 72, 136), ((2, 2050), 1024, 512)])
def test_residual(assert_as_exact, dtype, rows, dim, hidden):
    shapes = [(*rows, dim), (hidden, dim), (hidden, dim), (dim, hidden), (*rows, dim)]
    tensors = [normal(*s, dtype=dtype, scale=s[-1] ** -0.5) for s in shapes]
    tensors[0], tensors[4] = tensors[0] * dim**0.5, tensors[4] * dim**0.5
    grad = normal(*rows, dim, dtype=dtype)

    def plain(dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
        x, w_gate, w_up, w_down, residual = leaves
        hidden = F.silu(F.linear(x, w_gate)) * F.linear(x, w_up)
        out = residual + F.linear(hidden, w_down)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    leaves = [t.requires_grad_() for t in tensors]
    out = gated_mlp(*leaves[:4], residual=leaves[4])
    found = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for mine, theirs, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


def test_frozen_weights_get_no_gradients_and_cost_no_memory():
    tokens, dim, hidden = 4096, 512, 4096
    shapes = [(tokens, dim), (hidden, dim), (hidden, dim), (dim, hidden)]
    x, *weights = (normal(*s, dtype=torch.bfloat16, scale=0.02) for s in shapes)
    x.requires_grad_()
    out = gated_mlp(x, *weights)
    grad = torch.ones_like(out)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out.backward(grad)
    assert all(w.grad is None for w in weights)
    projection = tokens * hidden * 2
    # The gradients of gate and up; neither the product of the two nor one more of that size.
    assert torch.cuda.max_memory_allocated() - before < 2.5 * projection


def test_memory_kept_and_used_for_the_backward_pass():
    tokens, dim, hidden = 4096, 512, 4096
    shapes = [(tokens, dim), (hidden, dim), (hidden, dim), (dim, hidden)]
    leaves = [normal(*s, dtype=torch.bfloat16, scale=0.02).requires_grad_() for s in shapes]
    projection = tokens * hidden * 2
    before = torch.cuda.memory_allocated()
    out = gated_mlp(*leaves)
    # gate and up are kept; their product is computed again.
    assert torch.cuda.memory_allocated() - before < 2.25 * projection
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out.backward(torch.ones_like(out))
    # On top of these: the product, and the gradients of gate and up.
    assert torch.cuda.max_memory_allocated() - before < 3.75 * projection


def test_first_work_of_a_thread():
    # As autograd's thread does, when memory comes from torch's cache and no other op was first.
    shapes = [(256, 512), (1024, 512), (1024, 512), (512, 1024)]
    tensors = [normal(*s, dtype=torch.bfloat16, scale=0.05) for s in shapes]
    expected = gated_mlp(*tensors).clone()
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(gated_mlp, *tensors).result(), expected)
