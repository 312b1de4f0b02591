import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import rms_norm

EPS = 1e-5


def plain(x, weight):
    return F.rms_norm(x, weight.shape, weight, EPS)


def ours(x, weight):
    return rms_norm(x, weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (7, 2), (3, 1, 127), (2, 5, 576), (257, 64)], ids=str)
def test_output_and_gradients(dtype, shape, obeys_the_rule, run_with_grads):
    tensors = torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)
    grad = torch.randn(shape)
    obeys_the_rule(
        run_with_grads(ours, tensors, grad),
        run_with_grads(plain, tensors, grad),
        run_with_grads(plain, tensors, grad, torch.float64),
    )


def test_the_scale_of_gemma_is_one_more_than_its_weight(run_with_grads):
    tensors, grad = (torch.randn(5, 16), torch.randn(16)), torch.randn(5, 16)
    results = [
        run_with_grads(function, tensors, grad)
        for function in (
            lambda x, w: rms_norm(x, w, EPS, unit_offset=True),
            lambda x, w: plain(x, 1 + w),
        )
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_single_channel_is_its_sign():
    x, weight = torch.tensor([[-3.0], [0.5]]), torch.tensor([2.0])
    torch.testing.assert_close(rms_norm(x, weight, 0.0), torch.tensor([[-2.0], [2.0]]))


def test_rows_of_any_size_are_normalised():
    # Mean squares of 1e-12 and 1e12 leave no room for fp16 or bf16 statistics.
    x = torch.randn(4, 64) * torch.tensor([1e-6, 1.0, 1e3, 1e6]).unsqueeze(1)
    y = rms_norm(x.bfloat16(), torch.ones(64), 1e-20)
    torch.testing.assert_close(
        y.float().square().mean(-1), torch.ones(4), rtol=0.01, atol=0
    )  # two bf16 roundings of 2 ** -8 each, averaged over a row


def test_weight_may_have_another_dtype():
    x, weight = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(16)
    y = rms_norm(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.rms_norm(x.float(), (16,), weight, 1e-6).bfloat16())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.transpose(1, 2),
        lambda x: x[:1].expand(6, -1, -1),
    ],
    ids=["transposed", "sliced", "strided rows", "expanded"],
)
def test_strided_input_and_gradient(view, run_with_grads):
    x = view(torch.randn(4, 6, 8))
    weight, grad = torch.randn(x.shape[-1]), view(torch.randn(4, 6, 8))
    assert not x.is_contiguous()
    strided = run_with_grads(ours, (x, weight), grad)
    dense = run_with_grads(ours, (x.contiguous(), weight), grad.contiguous())
    for a, b in zip(strided, dense, strict=True):
        assert torch.equal(a, b)


def test_gradcheck():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(ours, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), torch.ones(4), TypeError, "x must be of a floating"),
        (torch.zeros(2, 4), torch.ones(4).int(), TypeError, "weight must be of a floating"),
        (torch.zeros(2, 4), torch.ones(5), ValueError, r"weight must have shape \[4\], got \[5\]"),
        (torch.zeros(2, 4), torch.ones(4, device="meta"), ValueError, "weight must be on cpu"),
    ],
    ids=["integers", "integer weight", "shape", "device"],
)
def test_bad_arguments(x, weight, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, weight)
