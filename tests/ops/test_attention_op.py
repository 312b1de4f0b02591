import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtune_fused.ops import attention, document_bounds, fused_attention, mask_tiles, rope
from torchtune_fused.ops.attention import closed_form, closed_form_backward


class ClosedForm(torch.autograd.Function):
    """The reference of devices without a kernel, differentiable on the CPU too."""

    @staticmethod
    def forward(ctx, q, k, v, mask, documents, *options):
        out, lse = closed_form(q, k, v, mask, None, documents, *options)
        ctx.save_for_backward(q, k, v, out, lse, mask, None, documents)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = closed_form_backward(
            grad, *ctx.saved_tensors, *ctx.options, False, None, None, None, False
        )
        return *grads, *[None] * (2 + len(ctx.options))


def reference(
    q, k, v, mask=None, causal=False, scale=None, window=None, documents=None, softcap=None
):
    mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ClosedForm.apply(q, k, v, mask, documents, causal, scale, window, softcap)


def op(q, k, v, mask=None, **options):
    return attention(q, k, v, mask, **options)


def qkv(b=2, h=4, h_kv=2, s=7, s_kv=None, d=16, dtype=torch.float32):
    s_kv = s_kv or s
    return [torch.randn(b, n, t, d, dtype=dtype) for n, t in ((h, s), (h_kv, s_kv), (h_kv, s_kv))]


def documents(b, s, count=3):
    return document_bounds(torch.randint(0, count, (b, s)).sort().values)


implementations = pytest.mark.parametrize("run", [op, reference], ids=["cpu", "reference"])

SHAPES = [  # b, h, h_kv, s, s_kv, d
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 31, 31, 64),
    (1, 4, 1, 5, 67, 80),
    (2, 7, 1, 17, 17, 96),
    (1, 8, 1, 65, 65, 128),
    (1, 9, 3, 13, 40, 256),
    (3, 4, 4, 129, 129, 40),
]


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(run, dtype, shape, exact_attention, obeys_the_rule, run_with_grads):
    b, h, _, s, s_kv, d = shape
    tensors, grad = qkv(*shape, dtype), torch.randn(b, h, s, d)
    cases = [
        {},
        {"mask": torch.rand(b, s, s_kv) < 0.5, "scale": 0.3},
        {"mask": torch.rand(1, h, s, s_kv) < 0.5, "window": 4},
        {"window": 3},
    ]
    if s == s_kv:
        cases += [{"causal": True}, {"causal": True, "window": 5}]
        cases += [{"causal": True, "mask": torch.rand(1, s, s) < 0.5, "softcap": 2.0}]
        cases += [{"causal": True, "documents": documents(b, s), "scale": 0.3}]
        cases += [{"documents": documents(b, s), "window": 4, "softcap": 0.7}]
    for case in cases:
        obeys_the_rule(
            run_with_grads(lambda *t, case=case: run(*t, **case), tensors, grad),
            run_with_grads(lambda *t, case=case: exact_attention(*t, **case), tensors, grad),
            run_with_grads(
                lambda *t, case=case: exact_attention(*t, **case), tensors, grad, torch.float64
            ),
        )


@implementations
def test_rows_that_see_nothing_give_zeros(run, run_with_grads):
    mask = torch.rand(2, 7, 7) < 0.5
    mask[0, 3] = mask[1, :2] = False
    blind = ~mask.any(-1)[:, None, :, None]
    tensors, grad = qkv(), torch.randn(2, 4, 7, 16)
    results, without = (
        run_with_grads(lambda q, k, v: run(q, k, v, mask), tensors, upstream)
        for upstream in (grad, grad.masked_fill(blind, 0))
    )
    for tensor in results[:2]:  # the output and the gradient of the queries
        assert not (tensor * blind).any()
    # Nor do such rows add to the gradients of keys and values.
    assert all(map(torch.equal, results, without))


@implementations
def test_a_mask_that_hides_everything(run, run_with_grads):
    mask = torch.zeros(1, 7, 7, dtype=torch.bool)
    results = run_with_grads(lambda q, k, v: run(q, k, v, mask), qkv(), torch.randn(2, 4, 7, 16))
    assert not any(tensor.any() for tensor in results)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_masks(data, exact_attention):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    b, h_kv, groups = integers(1, 3), integers(1, 3), integers(1, 4)
    s, d = integers(1, 20), integers(1, 9)
    causal = data.draw(st.booleans())
    s_kv = s if causal else s + integers(0, 20)
    window = data.draw(st.none() | st.integers(1, s_kv + 1))
    torch.manual_seed(integers(0, 2**31))
    mask_shape = (
        data.draw(st.sampled_from([1, b])),
        data.draw(st.sampled_from([1, h_kv * groups])),
    )
    visible = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    mask = torch.rand(*mask_shape, s, s_kv) < visible
    tensors = [t.double() for t in qkv(b, h_kv * groups, h_kv, s, s_kv, d)]
    softcap = data.draw(st.none() | st.floats(0.1, 10.0))
    options = {"mask": mask, "causal": causal, "window": window, "softcap": softcap}
    if s == s_kv and data.draw(st.booleans()):
        options["documents"] = documents(b, s, count=integers(1, 5))
    grad = torch.randn(b, h_kv * groups, s, d, dtype=torch.float64)
    results = []
    for run in (exact_attention, op, reference):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = run(*leaves, **options)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            # fp64 throughout: only the order of sums of up to 40 terms differs.
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "backward",
    [torch.ops.torchtune_fused.attention_backward, closed_form_backward],
    ids=["cpu", "reference"],
)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("input_pos", [None, torch.randperm(7), torch.randint(9, (2, 7)).int()])
def test_gradients_of_what_was_rotated(backward, softcap, interleaved, input_pos):
    q, k, v = (t.double().requires_grad_() for t in qkv())
    angles = torch.rand(9, 8, dtype=torch.float64) * 6
    rotation = angles.cos(), angles.sin(), input_pos

    def rotated(x):
        return rope(x.transpose(1, 2), *rotation, interleaved=interleaved).transpose(1, 2)

    options = None, None, None, True, 0.3, None, softcap
    tensors = rotated(q), rotated(k), v
    out, lse = torch.ops.torchtune_fused.attention(*tensors, *options)
    grad = torch.randn_like(out)
    truth = torch.autograd.grad(out, (q, k, v), grad)
    with torch.no_grad():
        ours = backward(grad, *tensors, out, lse, *options, False, *rotation, interleaved)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)
        assert a.transpose(1, 2).is_contiguous()


@implementations
@pytest.mark.parametrize("case", [{"causal": True}, {"window": 2}, {"softcap": 0.5}], ids=str)
def test_gradcheck(run, case):
    tensors = [t.double().requires_grad_() for t in qkv(1, 4, 2, 3, 3, 2)]
    assert torch.autograd.gradcheck(lambda *t: run(*t, **case), tensors)


def test_strided_inputs_and_gradient(run_with_grads):
    q, k, v = qkv()
    grad = torch.randn(2, 4, 7, 16)
    dense = run_with_grads(op, (q, k, v), grad)
    # As slices of a fused projection; with a last dimension that isn't dense; with an expanded
    # gradient, as sum() gives.
    fused = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)
    views = [t.unflatten(2, (-1, 16)).transpose(1, 2) for t in fused.split((64, 32, 32), -1)]
    for strided in (views, [t.mT.contiguous().mT for t in (q, k, v)]):
        for a, b in zip(run_with_grads(op, strided, grad.mT.contiguous().mT), dense, strict=True):
            torch.testing.assert_close(a, b)
    ones = torch.ones(())
    expanded = run_with_grads(op, (q, k, v), ones.expand(2, 4, 7, 16))
    for a, b in zip(expanded, run_with_grads(op, (q, k, v), torch.ones(2, 4, 7, 16)), strict=True):
        torch.testing.assert_close(a, b)


@implementations
def test_output_is_laid_out_so_that_heads_merge(run):
    out = run(*qkv())
    assert out.transpose(1, 2).is_contiguous()


@implementations
def test_large_scores_do_not_overflow(run):
    q, k, v = qkv()
    out = run(q * 1e4, k * 1e4, v)
    best = (q @ k.repeat_interleave(2, 1).mT).argmax(-1, keepdim=True).expand(-1, -1, -1, 16)
    torch.testing.assert_close(out, v.repeat_interleave(2, 1).gather(2, best))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tiles_are_as_good_as_the_mask(softcap, run_with_grads):
    tensors, grad = qkv(s=70, s_kv=131), torch.randn(2, 4, 70, 16)
    for mask in (torch.rand(2, 70, 131) < 0.3, torch.rand(1, 4, 70, 131) < 0.3):
        results = [
            run_with_grads(lambda *t, m=m: attention(*t, m, softcap=softcap), tensors, grad)
            for m in (mask, mask_tiles(mask))
        ]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_fused_attention_is_attention_to_everything(exact_attention):
    q, k, v = qkv(h_kv=4)
    torch.testing.assert_close(fused_attention(q, k, v, 0.5), exact_attention(q, k, v, scale=0.5))


Q, K, V = qkv()
BOUNDS = documents(2, 7)
TILES = mask_tiles(torch.ones(2, 7, 7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], K, V), {}, ValueError, r"must have shape \[b, heads, s, d\]"),
        ((Q.int(), K, V), {}, TypeError, "q must be of a floating"),
        ((Q, K.half(), V), {}, TypeError, "k must be torch.float32 as q is, got torch.float16"),
        ((Q, K, V.to("meta")), {}, ValueError, "v must be on cpu as q is, got meta"),
        ((Q, K[:1], V[:1]), {}, ValueError, r"k must have shape \[2, 2, 7, 16\]"),
        ((Q, K, V[:, :, :3]), {}, ValueError, r"v must have shape \[2, 2, 7, 16\]"),
        ((Q[:, :3], K, V), {}, ValueError, "heads of q must be a multiple of those of k"),
        ((Q[:, :, :0], K, V), {}, ValueError, "at least one token"),
        ((Q, K[:, :, :0], V[:, :, :0]), {}, ValueError, "at least one token"),
        ((Q[:, :, :3], K, V), {"causal": True}, ValueError, "as many queries as keys, got 3 and 7"),
        ((Q, K, V), {"window": 0}, ValueError, "window must be at least 1, got 0"),
        ((Q, K, V), {"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0"),
        ((Q[:, :, :3], K, V), {"documents": BOUNDS}, ValueError, "documents need as many queries"),
        ((Q, K, V), {"documents": BOUNDS.long()}, TypeError, "documents must be int32"),
        ((Q, K, V), {"documents": BOUNDS[:, :1]}, ValueError, r"must have shape \[2, 2, 7\]"),
        ((Q, K, V, TILES._replace(bits=TILES.bits[:, :, 1:])), {}, ValueError, "the bits of mask"),
        ((Q, K, V, TILES._replace(kinds=TILES.kinds[..., :0])), {}, ValueError, "the kinds of"),
        ((Q, K, V, torch.zeros(2, 7, 7)), {}, TypeError, "mask must be bool"),
        ((Q, K, V, torch.zeros(7, 7).bool()), {}, ValueError, r"mask must have shape \[2 or 1, 7"),
        ((Q, K, V, torch.zeros(3, 7, 7).bool()), {}, ValueError, r"got \[3, 7, 7\]"),
        ((Q, K, V, torch.zeros(2, 3, 7, 7).bool()), {}, ValueError, r"got \[2, 3, 7, 7\]"),
        ((Q, K, V, torch.zeros(2, 7, 6).bool()), {}, ValueError, r"got \[2, 7, 6\]"),
        ((Q, K, V, torch.zeros(2, 7, 7).bool().to("meta")), {}, ValueError, "mask must be on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)
