import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(3,), (7, 2), (3, 1, 127), (2, 5, 576), (257, 64)]


def plain(x, residual, weight):
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, EPS), total


def ours(x, residual, weight):
    return add_rms_norm(x, residual, weight, EPS)


def outputs_and_gradients(function, tensors, grads, dtype=None):
    leaves = [None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    leaves = [leaf for leaf in leaves if leaf is not None]
    # Once more by a number, as in a model: without a residual, the sum is the leaf itself.
    return [o.detach() for o in outputs] + list(
        torch.autograd.grad([o * 1 for o in outputs], leaves, grads)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["sum", "stream"])
def test_outputs_and_gradients(dtype, shape, with_residual, obeys_the_rule):
    x, residual, *grads = (torch.randn(shape, dtype=dtype) for _ in range(4))
    tensors = x, residual if with_residual else None, torch.randn(shape[-1], dtype=dtype)
    obeys_the_rule(
        outputs_and_gradients(ours, tensors, grads),
        outputs_and_gradients(plain, tensors, grads),
        outputs_and_gradients(plain, tensors, grads, torch.float64),
    )


@pytest.mark.parametrize("unit_offset", [False, True])
def test_the_same_bits_as_one_by_one(unit_offset):
    x, residual = (torch.randn(5, 7, 48).bfloat16() for _ in range(2))
    weight = torch.randn(48)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, total = add_rms_norm(x, residual, weight, EPS, unit_offset=unit_offset)
            assert torch.equal(total, x + residual)
            assert torch.equal(y, rms_norm(total, weight, EPS, unit_offset=unit_offset))


@pytest.mark.parametrize("used", [0, 1], ids=["norm", "sum"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["sum", "stream"])
def test_one_output_alone(used, with_residual):
    tensors = [torch.randn(5, 8), torch.randn(5, 8) if with_residual else None]
    results = []
    for function in (ours, plain):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        (function(*leaves, torch.linspace(1, 2, 8))[used] * torch.arange(8)).sum().backward()
        results.append([leaf.grad for leaf in leaves if leaf is not None])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_strided_arguments():
    x, residual, *grads = (torch.randn(6, 8, 5).transpose(1, 2) for _ in range(4))
    weight = torch.randn(16)[::2]
    strided = outputs_and_gradients(ours, (x, residual, weight), grads)
    dense = outputs_and_gradients(
        ours, [t.contiguous() for t in (x, residual, weight)], [g.contiguous() for g in grads]
    )
    assert all(map(torch.equal, strided, dense))


@pytest.mark.parametrize("with_residual", [True, False], ids=["sum", "stream"])
def test_gradcheck(with_residual):
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (x, residual if with_residual else None, weight))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 4).long(), None, torch.ones(4)), TypeError, "x must be of a floating"),
        ((torch.zeros(2, 4), None, torch.ones(5)), ValueError, r"weight must have shape \[4\]"),
        (
            (torch.zeros(2, 4), torch.zeros(1, 4), torch.ones(4)),
            ValueError,
            r"residual must have shape \[2, 4\], got \[1, 4\]",
        ),
        (
            (torch.zeros(2, 4), torch.zeros(2, 4).half(), torch.ones(4)),
            TypeError,
            "residual must be torch.float32 as x is, got torch.float16",
        ),
    ],
    ids=["integers", "weight", "shape", "dtype"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(*arguments)
