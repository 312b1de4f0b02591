import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import rms_norm

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


def with_gradients(function, tensors, grad, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    # Rows of whole vectors: of one thread, several to a block, of one block, of the longest.
    [
        (5, 8),
        (1031, 64),
        (300, 80),
        (3, 7, 576),
        (777, 1000),
        (2, 129, 2048),
        (517, 4096),
        (33, 16384),
        # Any rows: a single channel, odd, prime, longer than what registers hold.
        (9, 1),
        (7, 127),
        (3, 1021),
        (5, 40000),
    ],
    ids=str,
)
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
        truth = with_gradients(reference, (x, weight), grad, torch.float64)
        check(assert_as_exact, (ours, low, truth), dtype)


@pytest.mark.parametrize("weight_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_weight_of_another_dtype(assert_as_exact, dtype, weight_dtype):
    x, grad = (torch.randn(300, 768, device="cuda").to(dtype) for _ in range(2))
    weight = torch.randn(768, device="cuda").to(weight_dtype)
    ours = with_gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), grad)
    low = with_gradients(lambda x, w: plain(x, w.to(x.dtype)), (x, weight), grad)
    truth = with_gradients(plain, (x, weight), grad, torch.float64)
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


def test_rows_that_no_vector_starts_at(assert_as_exact):
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
