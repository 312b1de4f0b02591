from functools import partial

import pytest
import torch

from torchtune_fused.ops import AdaptedLinear, qkv_linear

SCALE = 1.7
WIDTHS, RANKS = (12, 6, 6), (3, 2, 4)
PARTS = "weight", "a", "b", "bias", "seen"


@pytest.fixture
def tensors_of(projections):
    return partial(projections.tensors, widths=WIDTHS, ranks=RANKS)


@pytest.fixture
def ours(projections):
    def of(keys):
        def run(*values):
            tensors = dict(zip(keys, values, strict=True))
            layers, seen = projections.layers(tensors)
            outputs = qkv_linear(tensors["x"], *layers, scale=SCALE, adapter_inputs=seen)
            return torch.cat(outputs, dim=-1)

        return run

    return of


@pytest.fixture
def plain(projections):
    def of(keys):
        def run(*values):
            outputs = projections.plain(dict(zip(keys, values, strict=True)), SCALE)
            return torch.cat(outputs, dim=-1)

        return run

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 5, 1), (4, 0, 2), (0, 0, 3)])
@pytest.mark.parametrize("extra", [{}, {"bias": True}, {"bias": True, "seen": True}], ids=str)
def test_output_and_gradients(
    dtype, ranks, extra, obeys_the_rule, run_with_grads, tensors_of, ours, plain
):
    for rows, dim, widths in [((), 1, (1, 1, 1)), ((2, 7), 64, (33, 11, 11)), ((1, 1), 31, WIDTHS)]:
        tensors = tensors_of(rows, dim, widths=widths, ranks=ranks, dtype=dtype, **extra)
        grad = torch.randn(*rows, sum(widths))
        values = list(tensors.values())
        obeys_the_rule(
            run_with_grads(ours(tensors), values, grad),
            run_with_grads(plain(tensors), values, grad),
            run_with_grads(plain(tensors), values, grad, torch.float64),
        )


@pytest.mark.parametrize("trained", ["x", *(f"{p} {name}" for name in "qkv" for p in PARTS)])
def test_only_the_gradients_asked_for(trained, tensors_of, ours, plain):
    tensors = tensors_of((3,), 8, bias=True, seen=True)
    tensors[trained].requires_grad_()
    grad = torch.randn(3, sum(WIDTHS))
    expected, got = (
        torch.autograd.grad(f(tensors)(*tensors.values()), tensors[trained], grad)[0]
        for f in (plain, ours)
    )
    torch.testing.assert_close(got, expected)


def test_some_adapters_see_what_others_do_not(run_with_grads, tensors_of, ours, plain):
    tensors = tensors_of((5,), 8, seen=True)
    del tensors["seen k"]
    grad, values = torch.randn(5, sum(WIDTHS)), list(tensors.values())
    expected = run_with_grads(plain(tensors), values, grad)
    for a, b in zip(run_with_grads(ours(tensors), values, grad), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck(tensors_of, ours):
    tensors = tensors_of((3,), 4, dtype=torch.float64, bias=True)
    assert torch.autograd.gradcheck(ours(tensors), [t.requires_grad_() for t in tensors.values()])


def test_one_of_the_outputs_alone_has_gradients(tensors_of):
    t = tensors_of((5,), 8, ranks=(0, 0, 0))
    x = t["x"].requires_grad_()
    _, keys, _ = qkv_linear(x, *(AdaptedLinear(t[f"weight {name}"]) for name in "qkv"))
    keys.sum().backward()
    torch.testing.assert_close(x.grad, t["weight k"].sum(0).expand(5, 8))


def test_strided_input(run_with_grads, tensors_of, ours):
    tensors = tensors_of((4, 6), 8)
    grad = torch.randn(sum(WIDTHS), 6, 4).transpose(0, 2)
    dense = run_with_grads(ours(tensors), list(tensors.values()), grad.contiguous())
    tensors["x"] = tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    tensors["weight q"] = tensors["weight q"].t().contiguous().t()
    strided = run_with_grads(ours(tensors), list(tensors.values()), grad)
    for a, b in zip(strided, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seen", [False, True], ids=["", "dropout"])
def test_what_is_kept_is_the_tensor_that_was_passed(seen, tensors_of, ours):
    tensors = tensors_of((5,), 8, seen=seen)
    for key, tensor in tensors.items():
        tensor.requires_grad_("weight" not in key)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(tensors)(*tensors.values())
    # A frozen layer with dropout needs only what the adapters saw.
    assert any(t is tensors["x"] for t in saved) != seen
    assert all(any(t is tensors[key] for t in saved) for key in tensors if "seen" in key)


@pytest.mark.parametrize(
    ("key", "value", "error", "message"),
    [
        ("x", torch.zeros(3, 8).int(), TypeError, "x must be of a floating"),
        ("weight k", torch.zeros(6, 9), ValueError, r"weight_k must have shape \[6, 8\]"),
        ("a v", torch.zeros(4, 9), ValueError, r"a_v must have shape \[4, 8\], got \[4, 9\]"),
        ("b q", torch.zeros(12, 3).half(), TypeError, "b_q must be torch.float32 as x is"),
        ("b q", None, ValueError, "a_q and b_q come together"),
        ("bias k", torch.zeros(8), ValueError, r"bias_k must have shape \[6\]"),
        ("seen v", torch.zeros(2, 8), ValueError, r"adapter_inputs of v must have shape \[3, 8\]"),
    ],
)
def test_bad_arguments(key, value, error, message, tensors_of, ours):
    tensors = tensors_of((3,), 8, bias=True, seen=True)
    tensors[key] = value
    with pytest.raises(error, match=message):
        ours(tensors)(*tensors.values())
