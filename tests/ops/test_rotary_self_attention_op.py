from functools import partial

import pytest
import torch

from torchtune_fused.ops import document_bounds, mask_tiles, rotary_self_attention

B, S, DIM, HEADS, KV_HEADS, D = 2, 7, 12, 6, 2, 8
SCALE = 1.7
MASK = torch.rand(B, S, S, generator=torch.Generator().manual_seed(3)) < 0.5
DOCUMENTS = document_bounds(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 2]]))


def angles():
    angle = 6 * torch.rand(9, D // 2)
    return angle.cos(), angle.sin()


@pytest.fixture
def tensors_of(projections):
    widths = [heads * D for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return partial(projections.tensors, (B, S), DIM, widths, ranks=(0, 0, 0))


@pytest.fixture
def ours(projections):
    def of(keys, cos, sin, input_pos=None, mask=None, **options):
        def run(*values):
            tensors = dict(zip(keys, values, strict=True))
            layers, options["adapter_inputs"] = projections.layers(tensors)
            return rotary_self_attention(
                tensors["x"], *layers, cos, sin, input_pos, mask, **options
            )

        return run

    return of


@pytest.fixture
def plain(projections, plain_rotation, exact_attention):
    def of(keys, *rotation, interleaved, scale=1.0, **options):
        def run(*values):
            outputs = projections.plain(dict(zip(keys, values, strict=True)), scale)
            q, k, v = (out.unflatten(-1, (-1, D)) for out in outputs)
            q, k = (plain_rotation(t, *rotation, interleaved=interleaved) for t in (q, k))
            out = exact_attention(*(t.transpose(1, 2) for t in (q, k, v)), **options)
            return out.transpose(1, 2).flatten(2)

        return run

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("input_pos", [None, torch.randperm(7), torch.randint(9, (B, S)).int()])
@pytest.mark.parametrize(
    "extra",
    [{}, {"bias": True, "ranks": (3, 0, 5)}, {"ranks": (2, 2, 2), "seen": True}],
    ids=["plain", "bias and adapters", "dropout"],
)
def test_output_and_gradients(
    dtype, interleaved, input_pos, extra, obeys_the_rule, run_with_grads, tensors_of, ours, plain
):
    tensors = tensors_of(dtype=dtype, **extra)
    arguments = *angles(), input_pos
    options = {"interleaved": interleaved, "scale": SCALE, "causal": True}
    grad, values = torch.randn(B, S, HEADS * D), list(tensors.values())
    expected = plain(tensors, *arguments, **options)
    obeys_the_rule(
        run_with_grads(ours(tensors, *arguments, **options), values, grad),
        run_with_grads(expected, values, grad),
        run_with_grads(expected, values, grad, torch.float64),
    )


@pytest.mark.parametrize(
    "hidden",
    [
        {},
        {"mask": MASK},
        {"mask": MASK[:1], "causal": True},
        {"window": 3},
        {"window": 3, "causal": True},
        {"documents": DOCUMENTS, "causal": True},
    ],
    ids=str,
)
def test_what_is_hidden(hidden, run_with_grads, tensors_of, ours, plain):
    tensors, tables = tensors_of(dtype=torch.float64), angles()
    grad, values = torch.randn(B, S, HEADS * D), list(tensors.values())
    options = {"interleaved": True, **hidden}
    truth = run_with_grads(plain(tensors, *tables, **options), values, grad)
    found = run_with_grads(ours(tensors, *tables, **options), values, grad)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)
    if "mask" in hidden:
        options["mask"] = mask_tiles(hidden["mask"])
        again = run_with_grads(ours(tensors, *tables, **options), values, grad)
        assert all(map(torch.equal, again, found))


def test_gradcheck(tensors_of, ours):
    tensors = tensors_of(dtype=torch.float64, bias=True, ranks=(2, 0, 1))
    run = ours(tensors, *angles(), interleaved=False, causal=True)
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("trained", ["x", "weight k", "bias v", "a q", "b k", "seen v"])
def test_only_the_gradients_asked_for(trained, tensors_of, ours, plain):
    tensors = tensors_of(bias=True, ranks=(2, 2, 2), seen=True)
    tensors[trained].requires_grad_()
    tables, grad = angles(), torch.randn(B, S, HEADS * D)
    runs = (
        plain(tensors, *tables, interleaved=True),
        ours(tensors, *tables, interleaved=True),
    )
    expected, got = (
        torch.autograd.grad(run(*tensors.values()), tensors[trained], grad)[0] for run in runs
    )
    # fp32, with sums in another order and an exp of 20 bits.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("seen", [False, True], ids=["", "dropout"])
def test_what_is_kept_is_the_tensor_that_was_passed(seen, tensors_of, ours):
    tensors = tensors_of(ranks=(2, 2, 2), seen=seen)
    for key, tensor in tensors.items():
        tensor.requires_grad_("weight" not in key)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(tensors, *angles(), interleaved=True)(*tensors.values())
    # A frozen layer with dropout needs only what the adapters saw.
    assert any(t is tensors["x"] for t in saved) != seen
    assert all(any(t is tensors[key] for t in saved) for key in tensors if "seen" in key)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight k": torch.zeros(16, 9)}, ValueError, r"weight_k must have shape \[16, 12\]"),
        ({"weight v": torch.zeros(24, DIM)}, ValueError, r"got \[2, 7, 12\] and \[48, 16, 24\]"),
        ({"weight q": torch.zeros(24, DIM)}, ValueError, "a divisor of h"),
        ({"x": torch.zeros(S, DIM)}, ValueError, r"x of shape \[b, s, in\]"),
        ({"x": torch.zeros(B, S, DIM).half()}, TypeError, "weight_q must be torch.float16"),
        ({"input_pos": torch.zeros(3).int()}, ValueError, "input_pos must have 7 or 2 x 7"),
        ({"input_pos": torch.full((S,), 9)}, ValueError, "positions from 9 to 9"),
        ({"mask": torch.ones(B, S, 6).bool()}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(B, S, S)}, TypeError, "mask must be bool"),
        ({"documents": DOCUMENTS[:, :1]}, ValueError, "documents must have shape"),
        ({"window": 0}, ValueError, "window must be at least 1"),
    ],
)
def test_bad_arguments(changes, error, message, tensors_of, ours):
    tensors = tensors_of()
    options = {key: value for key, value in changes.items() if key not in tensors}
    tensors |= {key: value for key, value in changes.items() if key in tensors}
    with pytest.raises(error, match=message):
        ours(tensors, *angles(), interleaved=True, **options)(*tensors.values())
