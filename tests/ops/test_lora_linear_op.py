import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import AdaptedLinear, lora_gated_mlp, lora_linear

SCALE = 1.7


def normal(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5 for shape in shapes]


def plain(x, weight, a, b, bias=None, seen=None):
    seen = x if seen is None else seen
    return F.linear(x, weight, bias) + SCALE * F.linear(F.linear(seen, a), b)


def ours(x, weight, a, b, bias=None, seen=None):
    return lora_linear(x, weight, a, b, bias, scale=SCALE, adapter_input=seen)


def shapes(rows, k, n, rank):
    return [(*rows, k), (n, k), (rank, k), (n, rank), (n,), (*rows, k)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [4, 5, 6], ids=["", "bias", "bias and dropout"])
def test_output_and_gradients(dtype, count, obeys_the_rule, run_with_grads):
    for rows, k, n, rank in [((), 1, 1, 1), ((2, 7), 64, 33, 5), ((1, 1), 31, 128, 64)]:
        tensors = normal(*shapes(rows, k, n, rank), dtype=dtype)[:count]
        grad = torch.randn(*rows, n)
        obeys_the_rule(
            run_with_grads(ours, tensors, grad),
            run_with_grads(plain, tensors, grad),
            run_with_grads(plain, tensors, grad, torch.float64),
        )


@pytest.mark.parametrize("trained", range(6))
def test_only_the_gradients_asked_for(trained):
    tensors = normal(*shapes((3,), 4, 6, 2))
    tensors[trained].requires_grad_()
    grad = torch.randn(3, 6)
    (expected,) = torch.autograd.grad(plain(*tensors), tensors[trained], grad)
    (got,) = torch.autograd.grad(ours(*tensors), tensors[trained], grad)
    torch.testing.assert_close(got, expected)


def test_gradcheck():
    tensors = [t.requires_grad_() for t in normal(*shapes((3,), 4, 5, 2), dtype=torch.float64)]
    assert torch.autograd.gradcheck(ours, tensors)


def test_strided_input(run_with_grads):
    tensors = normal(*shapes((4, 6), 8, 12, 3))[:5]
    grad = torch.randn(12, 6, 4).transpose(0, 2)
    dense = run_with_grads(ours, tensors, grad.contiguous())
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    tensors[1] = tensors[1].t().contiguous().t()
    for a, b in zip(run_with_grads(ours, tensors, grad), dense, strict=True):
        torch.testing.assert_close(a, b)


def test_a_frozen_layer_with_dropout_keeps_what_the_adapter_saw_only():
    x, weight, a, b, _, seen = normal(*shapes((5,), 8, 12, 3))
    for tensor in (a, b, seen):
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, weight, a, b, None, seen)
    assert any(t is seen for t in saved)
    assert not any(t is x for t in saved)


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(3, 8).int(), TypeError, "x must be of a floating"),
        (1, torch.zeros(12, 9), ValueError, r"weight must have shape \[12, 8\], got \[12, 9\]"),
        (2, torch.zeros(3, 9), ValueError, r"a must have shape \[3, 8\], got \[3, 9\]"),
        (3, torch.zeros(12, 4), ValueError, r"b must have shape \[12, 3\], got \[12, 4\]"),
        (3, torch.zeros(12, 3).half(), TypeError, "b must be torch.float32 as x is"),
        (4, torch.zeros(8), ValueError, r"bias must have shape \[12\]"),
        (5, torch.zeros(2, 8), ValueError, r"adapter_input must have shape \[3, 8\]"),
        (2, torch.zeros(3, 8, device="meta"), ValueError, "a must be on cpu as x is, got meta"),
    ],
)
def test_bad_arguments(index, value, error, message):
    tensors = normal(*shapes((3,), 8, 12, 3))
    tensors[index] = value
    with pytest.raises(error, match=message):
        ours(*tensors)


# ---- Three of them around an activation ----------------------------------------------------------

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def layers_of(tensors):
    """Gate, up and down from a flat list of weights, adapters and, if there are more, biases."""
    weights, adapters, biases = tensors[:3], tensors[3:9], tensors[9:] or (None,) * 3
    return [
        AdaptedLinear(weights[i], adapters[2 * i], adapters[2 * i + 1], biases[i]) for i in range(3)
    ]


def mlp_shapes(rows, dim, hidden, out, bias):
    weights = [(hidden, dim), (hidden, dim), (out, hidden)]
    adapters = [(2, dim), (hidden, 2), (3, dim), (hidden, 3), (5, hidden), (out, 5)]
    return [(*rows, dim), *weights, *adapters, *([(hidden,), (hidden,), (out,)] if bias else [])]


def plain_mlp(activation):
    def run(x, *tensors):
        gate, up, down = layers_of(tensors)

        def project(h, layer):
            return plain(h, layer.weight, layer.a, layer.b, layer.bias)

        return project(ACTIVATIONS[activation](project(x, gate)) * project(x, up), down)

    return run


def our_mlp(activation):
    return lambda x, *tensors: lora_gated_mlp(
        x, *layers_of(tensors), scale=SCALE, activation=activation
    )


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [(name, torch.float32) for name in ACTIVATIONS]
    # Not ReLU: where a gate rounds to the other side of zero, its slope is wrong by all of it.
    + [(name, half) for name in list(ACTIVATIONS)[:3] for half in (torch.bfloat16, torch.float16)],
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_mlp_output_and_gradients(activation, dtype, bias, obeys_the_rule, run_with_grads):
    for rows, dim, hidden, out in [((), 1, 1, 1), ((2, 7), 64, 97, 33), ((1, 1), 31, 128, 31)]:
        tensors = normal(*mlp_shapes(rows, dim, hidden, out, bias), dtype=dtype)
        grad = torch.randn(*rows, out)
        obeys_the_rule(
            run_with_grads(our_mlp(activation), tensors, grad),
            run_with_grads(plain_mlp(activation), tensors, grad),
            run_with_grads(plain_mlp(activation), tensors, grad, torch.float64),
        )


@pytest.mark.parametrize("trained", range(13))
def test_only_the_gradients_of_the_mlp_asked_for(trained):
    tensors = normal(*mlp_shapes((3,), 4, 6, 5, True))
    tensors[trained].requires_grad_()
    grad = torch.randn(3, 5)
    (expected,) = torch.autograd.grad(plain_mlp("silu")(*tensors), tensors[trained], grad)
    (got,) = torch.autograd.grad(our_mlp("silu")(*tensors), tensors[trained], grad)
    torch.testing.assert_close(got, expected)


def test_gradcheck_of_the_mlp():
    tensors = normal(*mlp_shapes((3,), 4, 5, 2, True), dtype=torch.float64)
    assert torch.autograd.gradcheck(our_mlp("gelu"), [t.requires_grad_() for t in tensors])


def test_the_mlp_keeps_two_tensors_as_wide_as_its_hidden_layer():
    tensors = normal(*mlp_shapes((4, 8), 16, 64, 16, False))
    for tensor in tensors[4:]:
        tensor.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        our_mlp("silu")(*tensors)
    assert len([t for t in saved if t.shape == (4, 8, 64)]) == 2


def test_bad_arguments_of_the_mlp():
    x, *tensors = normal(*mlp_shapes((3,), 8, 12, 8, False))
    tensors[5] = torch.zeros(4, 9)
    with pytest.raises(ValueError, match=r"lora_gated_mlp: a_up must have shape \[4, 8\]"):
        our_mlp("silu")(x, *tensors)
    with pytest.raises(ValueError, match="one of silu, gelu_tanh, gelu, relu, got 'swish'"):
        our_mlp("swish")(x, *tensors)
