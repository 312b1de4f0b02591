import pytest
import torch

from torchtune_fused.ops import rope

MAX_LEN = 40


def tables(d):
    angles = torch.arange(MAX_LEN).outer(10_000.0 ** (-torch.arange(0, d, 2) / d))
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 7, 3, 64), (1, 31, 1, 80), (3, 2, 5, 96)])
def test_output_and_gradient(
    interleaved, dtype, shape, obeys_the_rule, run_with_grads, plain_rotation
):
    x, grad = torch.randn(shape, dtype=dtype), torch.randn(shape)
    cos, sin = tables(shape[-1])
    for input_pos in (None, torch.randint(MAX_LEN, shape[:2])):

        def ours(x, pos=input_pos):
            return rope(x, cos, sin, pos, interleaved=interleaved)

        def reference(x, pos=input_pos):
            return plain_rotation(x, cos, sin, pos, interleaved=interleaved)

        obeys_the_rule(
            run_with_grads(ours, (x,), grad),
            run_with_grads(reference, (x,), grad),
            run_with_grads(reference, (x,), grad, torch.float64),
        )


@pytest.mark.parametrize(
    "input_pos",
    [torch.tensor([5, 0, 9]), torch.tensor([[5, 0, 9]]), torch.tensor([5, 0, 9]).int()],
    ids=["s", "1 x s", "int32"],
)
def test_positions_shared_by_the_batch(input_pos, plain_rotation):
    x, (cos, sin) = torch.randn(2, 3, 4, 8), tables(8)
    expected = plain_rotation(x, cos, sin, input_pos, interleaved=True)
    torch.testing.assert_close(rope(x, cos, sin, input_pos, interleaved=True), expected)


def test_one_position_for_each_row_of_a_decoding_batch(plain_rotation):
    x, (cos, sin), input_pos = torch.randn(3, 1, 4, 8), tables(8), torch.tensor([5, 0, 9])
    expected = plain_rotation(x, cos, sin, input_pos.view(3, 1), interleaved=False)
    torch.testing.assert_close(rope(x, cos, sin, input_pos, interleaved=False), expected)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_strided_arguments(interleaved):
    cos, sin = tables(8)
    cache = torch.stack((cos, sin), -1)
    x = torch.randn(2, 4, 3, 16).transpose(1, 2)[..., ::2]
    strided = rope(x, cache[..., 0], cache[..., 1], interleaved=interleaved)
    assert strided.is_contiguous()
    assert torch.equal(strided, rope(x.contiguous(), cos, sin, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_gradgradcheck(interleaved):
    cos, sin = tables(6)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)

    def rotate(x):
        return rope(x, cos.double(), sin.double(), interleaved=interleaved)

    assert torch.autograd.gradcheck(rotate, x)
    assert torch.autograd.gradgradcheck(rotate, x)


X, (COS, SIN) = torch.zeros(1, 3, 2, 8), tables(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], COS, SIN), ValueError, r"x must have shape \[b, s, h, d\]"),
        ((X[..., :7], COS, SIN), ValueError, "d even"),
        ((X.int(), COS, SIN), TypeError, "x must be of a floating"),
        ((X, COS[:, :2], SIN), ValueError, r"cos must have shape \[40, 4\], got \[40, 2\]"),
        ((X, COS, SIN[:5]), ValueError, r"sin must have shape \[40, 4\], got \[5, 4\]"),
        ((X, COS[:2], SIN[:2]), ValueError, "3 tokens, but cos and sin only 2 positions"),
        ((X, COS, SIN, torch.zeros(3)), TypeError, "input_pos must be int32 or int64"),
        ((X, COS, SIN, torch.arange(4)), ValueError, "input_pos must have 3 or 1 x 3 elements"),
        ((X, COS, SIN, torch.tensor([0, 1, 40])), ValueError, "positions from 0 to 40"),
        ((X, COS, SIN, torch.tensor([0, -1, 2])), ValueError, "positions from -1 to 2"),
        ((X, COS.to("meta"), SIN), ValueError, "cos must be on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        rope(*arguments, interleaved=True)
