import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import add_rms_norm, rms_norm

EPS = 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def plain(x, weight, unit_offset=False):
    return F.rms_norm(x, weight.shape, weight + 1 if unit_offset else weight, EPS)


def check(assert_as_exact, results, dtype):
    """The rule, by output; in fp32 and fp64, whose results no lower precision can judge, closeness.

    Sums there run in another order, and gradients are differences: 32 roundings of the largest, or
    of one, the order of their terms, of which a single channel leaves next to nothing.
    """
    for out, low, truth in zip(*results, strict=True):
        assert out.dtype == low.dtype
        if dtype in (torch.bfloat16, torch.float16):
            assert_as_exact(out, low, truth, dtype)
        else:
            atol = 32 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1).item()
            torch.testing.assert_close(out.double(), truth, rtol=0, atol=atol)


def with_gradients(function, tensors, *grads, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads)]


SHAPES = [
    # Rows of whole vectors: of one thread, several to a block, of one block, of the longest.
    (5, 8),
    (1031, 64),
    (300, 80),
    (3, 7, 576),
    (777, 1000),
    (2, 129, 2048),
    (517, 4096),
    (1100, 8192),
    # Any rows: a single channel, odd, prime, longer than what registers hold.
    (9, 1),
    (7, 127),
    (3, 1021),
    (33, 16384),
    (5, 40000),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(assert_as_exact, dtype, shape):
    x = torch.randn(shape, device="cuda").mul_(3).to(dtype)
    weight = torch.randn(shape[-1], device="cuda").to(dtype)
    grad = torch.randn(shape, device="cuda").to(dtype)
    for unit_offset in (False, True):

        def reference(x, weight, offset=unit_offset):
            return plain(x, weight, offset)

        ours = with_gradients(
            lambda x, w, o=unit_offset: rms_norm(x, w, EPS, unit_offset=o), (x, weight), grad
        )
        low = with_gradients(reference, (x, weight), grad)
        truth = with_gradients(reference, (x, weight), grad, dtype=torch.float64)
        check(assert_as_exact, (ours, low, truth), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_of_a_sum(assert_as_exact, dtype, shape, unit_offset):
    x, residual, *grads = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    weight = torch.randn(shape[-1], device="cuda").to(dtype)

    def ours(x, residual, weight):
        return add_rms_norm(x, residual, weight, EPS, unit_offset=unit_offset)

    def reference(x, residual, weight):
        total = x + residual
        return plain(total, weight, unit_offset), total

    tensors = x, residual, weight
    results = [
        with_gradients(ours, tensors, *grads),
        with_gradients(reference, tensors, *grads),
        with_gradients(reference, tensors, *grads, dtype=torch.float64),
    ]
    check(assert_as_exact, results, dtype)
    y, total = results[0][:2]
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(total, weight, EPS, unit_offset=unit_offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_the_stream_itself(assert_as_exact, dtype, shape):
    x, *grads = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1], device="cuda").to(dtype)

    def ours(x, weight):
        return add_rms_norm(x, None, weight, EPS)

    def reference(x, weight):
        return plain(x, weight), x + 0

    results = [
        with_gradients(ours, (x, weight), *grads),
        with_gradients(reference, (x, weight), *grads),
        with_gradients(reference, (x, weight), *grads, dtype=torch.float64),
    ]
    check(assert_as_exact, results, dtype)


def test_a_frozen_weight():
    x, residual, *grads = (torch.randn(5000, 1024, device="cuda").bfloat16() for _ in range(4))
    weight = torch.randn(1024, device="cuda")

    def frozen(x, residual):
        return add_rms_norm(x, residual, weight)

    expected = with_gradients(add_rms_norm, (x, residual, weight), *grads)[:4]
    assert all(map(torch.equal, with_gradients(frozen, (x, residual), *grads), expected))


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_weight_of_another_dtype(assert_as_exact, dtype, weight_dtype):
    x, grad = (torch.randn(300, 768, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(768, device="cuda").to(weight_dtype)
    ours = with_gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), grad)
    low = with_gradients(lambda x, w: plain(x, w.to(x.dtype)), (x, weight), grad)
    truth = with_gradients(plain, (x, weight), grad, dtype=torch.float64)
    assert [t.dtype for t in ours] == [dtype, dtype, weight_dtype]
    coarser = max(dtype, weight_dtype, key=lambda d: torch.finfo(d).eps)
    check(assert_as_exact, (ours, low, truth), coarser)


def test_strided_arguments():
    x = torch.randn(6, 128, 5, device="cuda").transpose(1, 2)
    weight, grad = torch.randn(256, device="cuda")[::2], torch.randn(5, 6, 128, device="cuda")
    strided = with_gradients(lambda x, w: rms_norm(x, w), (x, weight), grad.transpose(0, 1))
    dense = with_gradients(
        lambda x, w: rms_norm(x, w),
        (x.contiguous(), weight.contiguous()),
        grad.transpose(0, 1).contiguous(),
    )
    assert all(map(torch.equal, strided, dense))


def test_rows_that_no_vector_starts_at():
    buffer = torch.randn(7 * 256 + 1, device="cuda", dtype=torch.bfloat16)
    x, weight = buffer[1:].view(7, 256), torch.randn(256, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.clone(), weight))


def test_the_weight_gradient_is_deterministic():
    x, grad = (torch.randn(5000, 1024, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(1024, device="cuda")
    first, *others = (
        with_gradients(lambda x, w: rms_norm(x, w), (x, weight), grad) for _ in range(4)
    )
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_rows():
    x = torch.randn(0, 64, device="cuda", requires_grad=True)
    weight = torch.randn(64, device="cuda", requires_grad=True)
    grad_x, grad_weight = torch.autograd.grad(rms_norm(x, weight).sum(), (x, weight))
    assert grad_x.shape == (0, 64)
    assert torch.equal(grad_weight, torch.zeros(64, device="cuda"))


def test_nan_stays_in_its_row():
    x = torch.randn(9, 512, device="cuda").bfloat16()
    x[4, 100] = torch.nan
    y = rms_norm(x, torch.ones(512, device="cuda"))
    assert y[4].isnan().all()
    assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
