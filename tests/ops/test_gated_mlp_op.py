import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import fused_mlp, gated_mlp

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def plain(activation):
    def mlp(x, w_gate, w_up, w_down, b_gate=None, b_up=None, b_down=None):
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
        return F.linear(ACTIVATIONS[activation](gate) * up, w_down, b_down)

    return mlp


def ours(activation):
    return lambda *tensors: gated_mlp(*tensors, activation=activation)


def arguments(rows, dim, hidden, out, dtype=torch.float32, bias=False):
    shapes = [(*rows, dim), (hidden, dim), (hidden, dim), (out, hidden)]
    shapes += [(hidden,), (hidden,), (out,)] if bias else []
    return [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_output_and_gradients(activation, dtype, bias, obeys_the_rule, run_with_grads):
    for rows, dim, hidden, out in [((), 1, 1, 1), ((2, 7), 64, 97, 33), ((1, 1), 31, 128, 31)]:
        tensors = arguments(rows, dim, hidden, out, dtype, bias)
        grad = torch.randn(*rows, out)
        obeys_the_rule(
            run_with_grads(ours(activation), tensors, grad),
            run_with_grads(plain(activation), tensors, grad),
            run_with_grads(plain(activation), tensors, grad, torch.float64),
        )


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_residual(bias, run_with_grads):
    tensors = [*arguments((2, 7), 16, 24, 12, bias=bias), torch.randn(2, 7, 12)]
    grad = torch.randn(2, 7, 12)

    def together(*tensors):
        *tensors, residual = tensors
        return gated_mlp(*tensors, residual=residual)

    def apart(*tensors):
        *tensors, residual = tensors
        return residual + gated_mlp(*tensors)

    pairs = zip(
        run_with_grads(together, tensors, grad), run_with_grads(apart, tensors, grad), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"residual must have shape \[2, 7, 12\], got \[7, 12\]"):
        gated_mlp(*tensors[:-1], residual=torch.randn(7, 12))


@pytest.mark.parametrize("trained", range(7))
def test_only_the_gradients_asked_for(trained):
    tensors = arguments((3,), 4, 6, 5, bias=True)
    tensors[trained].requires_grad_()
    grad = torch.randn(3, 5)
    (expected,) = torch.autograd.grad(plain("silu")(*tensors), tensors[trained], grad)
    (got,) = torch.autograd.grad(gated_mlp(*tensors), tensors[trained], grad)
    torch.testing.assert_close(got, expected)
    assert all(tensor.grad is None for tensor in tensors)


def test_same_result_with_and_without_gradients():
    tensors = arguments((2, 3), 8, 12, 8)
    without = gated_mlp(*tensors)
    tensors[1].requires_grad_()
    assert torch.equal(without, gated_mlp(*tensors))


def test_memory_for_the_backward_pass_is_two_projections():
    saved = []
    tensors = [t.requires_grad_() for t in arguments((4, 8), 16, 64, 16)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_mlp(*tensors)
    hidden = [t for t in saved if t.shape == (4, 8, 64)]
    assert len(hidden) == 2  # gate and up; not their product


def test_strided_input(run_with_grads):
    tensors = arguments((4, 6), 8, 12, 8)
    grad = torch.randn(8, 6, 4).transpose(0, 2)
    dense = run_with_grads(ours("silu"), tensors, grad.contiguous())
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    tensors[1] = tensors[1].t().contiguous().t()
    for a, b in zip(run_with_grads(ours("silu"), tensors, grad), dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = [t.requires_grad_() for t in arguments((3,), 4, 5, 2, torch.float64, bias=True)]
    assert torch.autograd.gradcheck(ours(activation), tensors)


def test_fused_mlp_takes_the_names_of_llama():
    x, w1, w3, w2 = arguments((3,), 8, 12, 8)
    torch.testing.assert_close(fused_mlp(x, w1, w3, w2), (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(3, 8).int(), TypeError, "x must be of a floating"),
        (1, torch.zeros(12, 9), ValueError, r"w_gate must have shape \[12, 8\], got \[12, 9\]"),
        (2, torch.zeros(11, 8), ValueError, r"w_up must have shape \[12, 8\], got \[11, 8\]"),
        (3, torch.zeros(8, 11), ValueError, r"w_down must have shape \[8, 12\], got \[8, 11\]"),
        (3, torch.zeros(8, 12).half(), TypeError, "w_down must be torch.float32 as x is"),
        (4, torch.zeros(8), ValueError, r"b_gate must have shape \[12\]"),
        (5, torch.zeros(8), ValueError, r"b_up must have shape \[12\]"),
        (6, torch.zeros(12), ValueError, r"b_down must have shape \[8\]"),
        (2, torch.zeros(12, 8, device="meta"), ValueError, "w_up must be on cpu as x is, got meta"),
    ],
)
def test_bad_arguments(index, value, error, message):
    tensors = arguments((3,), 8, 12, 8, bias=True)
    tensors[index] = value
    with pytest.raises(error, match=message):
        gated_mlp(*tensors)


def test_unknown_activation():
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu, relu, got 'swish'"):
        gated_mlp(*arguments((3,), 8, 12, 8), activation="swish")
