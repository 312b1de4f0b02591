"""Attention of many queries, forward and backward, against fp64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchtune_fused.ops import attention, document_bounds, mask_tiles
from torchtune_fused.ops.attention_mask import _reference as reference_tiles


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def qkv(b, heads, kv_heads, s, d, s_kv=None, dtype=torch.bfloat16, tokens_first=True):
    """As projections give them, ``[b, s, h, d]`` in memory, or as caches lie, ``[b, h, s, d]``."""
    sizes = (heads, s), (kv_heads, s_kv or s), (kv_heads, s_kv or s)
    if tokens_first:
        return [normal(b, n, h, d, dtype=dtype).transpose(1, 2) for h, n in sizes]
    return [normal(b, h, n, d, dtype=dtype) for h, n in sizes]


def documents(b, s, count=5):
    return document_bounds(torch.randint(0, count, (b, s), device="cuda").sort().values)


def random_mask(*shape, visible=0.5):
    return torch.rand(shape, device="cuda") < visible


def outputs(function, tensors, grad, dtype, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.fixture
def check(assert_as_exact, plain_attention):
    """Output and gradients obey the rule; returns them."""

    def run(tensors, **options):
        q = tensors[0]
        # Gradients of a few tokens count a hundred times more than others.
        weight = 1 + 99 * (torch.rand(q.shape[0], 1, q.shape[2], 1, device="cuda") < 0.05)
        b, h, s, d = q.shape
        grad = (normal(b, s, h, d, dtype=q.dtype).transpose(1, 2) * weight).to(q.dtype)
        ours = outputs(attention, tensors, grad, q.dtype, **options)
        plain = outputs(plain_attention, tensors, grad, q.dtype, **options)
        truth = outputs(plain_attention, tensors, grad, torch.float64, **options)
        assert ours[0].transpose(1, 2).is_contiguous()
        # What a query gets from the gradients of its probabilities adds up to zero: with one key,
        # it is the difference of two sums of d products.
        terms = d * max(grad.abs().max(), 1.0) * tensors[2].abs().max()
        for results in zip(ours, plain, truth, strict=True):
            assert_as_exact(*results, q.dtype, terms.double())
        return ours

    return run


def cases(b, heads, s):
    """What hides keys, by name."""
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 50},
        "window both ways": {"window": 100, "scale": 0.2},
        "documents": {"causal": True, "documents": documents(b, s)},
        "documents and window": {"documents": documents(b, s), "window": 30},
        "mask": {"mask": random_mask(b, s, s)},
        "mask per head": {"mask": random_mask(1, heads, s, s), "causal": True},
        "sparse mask": {"mask": random_mask(b, 1, s, s, visible=0.01), "window": 90},
        "softcap": {"causal": True, "softcap": 1.5},
        "softcap and mask": {"mask": random_mask(1, s, s), "softcap": 0.5, "scale": 0.3},
    }


CASES = [
    *("none", "causal", "window", "window both ways", "documents", "documents and window"),
    *("mask", "mask per head", "sparse mask", "softcap", "softcap and mask"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (8, 2), (7, 1), (8, 1)])
@pytest.mark.parametrize("case", CASES)
def test_masks(check, dtype, d, heads, kv_heads, case):
    tensors = qkv(2, heads, kv_heads, 257, d, dtype=dtype, tokens_first=heads % 2 == 0)
    check(tensors, **cases(2, heads, 257)[case])


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("case", ["none", "causal", "documents", "mask"])
@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("s", [1, 2, 31, 63, 64, 65, 127, 128, 129, 191, 383, 1009, 2048])
def test_lengths(check, d, case, tokens_first, s):
    check(qkv(1, 4, 2, s, d, tokens_first=tokens_first), **cases(1, 4, s)[case])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("case", ["none", "causal", "mask"])
@pytest.mark.parametrize("first, last", [(2, -1), (-1, 2)])
def test_scores_far_above_those_before(
    assert_as_exact, plain_attention, dtype, d, case, first, last
):
    # Kernels take keys from either end, and one end's weigh a thousand times as much: more than the
    # exponents of fp32 bear, if what is subtracted from scores comes from the other end.
    q, k, v = qkv(1, 4, 2, 700, d, dtype=dtype)
    k = k * torch.logspace(first, last, 700, device="cuda").to(dtype).unsqueeze(1)
    tensors, options = (q, k, v), cases(1, 4, 700)[case]
    out = attention(*tensors, **options)
    truth = plain_attention(*(t.double() for t in tensors), **options)
    assert_as_exact(out, plain_attention(*tensors, **options), truth, dtype)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("s, s_kv", [(1, 500), (70, 131), (131, 70), (300, 1000)])
def test_keys_of_another_length(check, d, s, s_kv):
    tensors = qkv(2, 6, 2, s, d, s_kv)
    check(tensors)
    check(tensors, mask=random_mask(2, s, s_kv))
    check(tensors, mask=random_mask(2, s, s_kv), window=40)


@pytest.mark.parametrize("d", [8, 40, 72, 104, 136, 192, 248])
def test_head_dims_between_the_tiles(check, d):
    check(qkv(2, 4, 2, 150, d), causal=True)
    check(qkv(2, 4, 2, 150, d), mask=random_mask(2, 150, 150))


def test_one_long_sequence(check):
    check(qkv(1, 2, 1, 8191, 128, tokens_first=False), causal=True)
    check(qkv(1, 2, 1, 8191, 64), causal=True, documents=documents(1, 8191, count=40))


@pytest.mark.parametrize("case", ["causal", "mask"])
def test_views_of_a_fused_projection(check, case):
    fused = normal(2, 200, 12, 64)
    views = [t.transpose(1, 2) for t in fused.split((8, 2, 2), dim=2)]
    results = check(views, **cases(2, 8, 200)[case])
    assert results[1].transpose(1, 2).is_contiguous()


def test_rows_that_are_not_aligned(check):
    shifted = [normal(2, h, 100, 65)[..., 1:] for h in (4, 2, 2)]
    check(shifted, causal=True)
    check([t.mT.contiguous().mT for t in qkv(2, 4, 2, 100, 64)], causal=True)


def test_gradients_that_were_expanded():
    tensors = [t.requires_grad_() for t in qkv(2, 4, 2, 100, 64)]
    ones = torch.ones(2, 4, 100, 64, device="cuda", dtype=torch.bfloat16)
    for options in ({"causal": True}, {"mask": random_mask(2, 100, 100)}):
        out = attention(*tensors, **options)
        summed = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        for mine, expected in zip(summed, torch.autograd.grad(out, tensors, ones), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("s", [65, 300])
def test_rows_that_see_nothing(check, d, s):
    mask = random_mask(2, s, s)
    mask[0, s // 3 :] = mask[1, 7] = False
    out, grad_q, *_ = check(qkv(2, 4, 2, s, d), mask=mask)
    for tensor in (out, grad_q):
        assert not tensor[0, :, s // 3 :].any() and not tensor[1, :, 7].any()
    results = check(qkv(2, 4, 2, s, d), mask=torch.zeros_like(mask))
    assert not any(tensor.any() for tensor in results)


def test_large_scores(check):
    q, k, v = qkv(1, 4, 2, 300, 64)
    check([q * 30, k, v], causal=True)
    check([q * 30, k, v], mask=random_mask(1, 300, 300))


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_masks(check, data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(integers(0, 2**31))
    b, kv_heads, groups, s = integers(1, 2), integers(1, 3), integers(1, 4), integers(17, 300)
    s_kv = data.draw(st.just(s) | st.integers(17, 300))
    heads, d = kv_heads * groups, data.draw(st.sampled_from([64, 80, 128]))
    options = {}
    if data.draw(st.booleans()):
        # Random blocks, so that there are empty, full and partial tiles.
        shape = data.draw(st.sampled_from([1, b])), data.draw(st.sampled_from([1, heads])), 5, 5
        blocks = random_mask(*shape, visible=data.draw(st.sampled_from([0.1, 0.5, 0.9])))
        blocks = blocks.repeat_interleave(61, 2).repeat_interleave(61, 3)[:, :, :s, :s_kv]
        options["mask"] = blocks & random_mask(s, s_kv, visible=data.draw(st.floats(0.5, 1.1)))
    if data.draw(st.booleans()):
        options["window"] = integers(1, s_kv + 1)
    if s == s_kv:
        options["causal"] = data.draw(st.booleans())
        if data.draw(st.booleans()):
            options["documents"] = documents(b, s, count=integers(1, 6))
    check(qkv(b, heads, kv_heads, s, d, s_kv, tokens_first=data.draw(st.booleans())), **options)


def test_tiles_are_as_the_reference_makes_them():
    for shape in ((1, 1, 1, 1), (2, 1, 64, 64), (1, 3, 65, 127), (3, 2, 130, 1600)):
        for visible in (0.0, 0.5, 0.999, 1.0):
            mask = random_mask(*shape, visible=visible)
            for strided in (mask, mask.repeat(1, 1, 1, 2)[..., shape[3] :], mask[:1].expand(shape)):
                for ours, expected in zip(
                    mask_tiles(strided), reference_tiles(strided), strict=True
                ):
                    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", ["none", "causal", "documents", "mask"])
def test_deterministic_gradients(case, check):
    tensors = [t.requires_grad_() for t in qkv(2, 8, 2, 1000, 64)]
    options, grad = cases(2, 8, 1000)[case], normal(2, 8, 1000, 64)
    torch.use_deterministic_algorithms(True)
    try:
        check(tensors, **options)
        runs = [
            torch.autograd.grad(attention(*tensors, **options), tensors, grad) for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [8, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("heads, kv_heads, s", [(4, 4, 70), (9, 3, 257), (8, 2, 1000), (7, 1, 129)])
@pytest.mark.parametrize("kind", ["counted", "shared", "batched", "deterministic", "bf16 tables"])
def test_gradients_of_what_was_rotated(
    assert_as_exact,
    plain_attention,
    plain_rotation,
    dtype,
    d,
    interleaved,
    heads,
    kv_heads,
    s,
    kind,
):
    q, k, v = qkv(2, heads, kv_heads, s, d, dtype=dtype)
    angles = torch.rand(s + 5, d // 2, device="cuda") * 6.28
    tables = torch.stack((angles.cos(), angles.sin()), -1)  # as torchtune's cache
    cos, sin = tables.bfloat16().unbind(-1) if kind == "bf16 tables" else tables.unbind(-1)
    input_pos = {
        "shared": torch.randint(s + 5, (s,), device="cuda"),
        "batched": torch.randint(s + 5, (2, s), device="cuda", dtype=torch.int32),
    }.get(kind)
    grad = normal(2, s, heads, d, dtype=dtype).transpose(1, 2)

    def plain(precision):
        leaves = [t.detach().to(precision).requires_grad_() for t in (q, k, v)]
        rotated = [
            plain_rotation(
                t.transpose(1, 2), cos, sin, input_pos, interleaved=interleaved
            ).transpose(1, 2)
            for t in leaves[:2]
        ]
        out = plain_attention(*rotated, leaves[2], causal=True)
        return torch.autograd.grad(out, leaves, grad.to(precision))

    ops, options = torch.ops.torchtune_fused, (None, None, None, True, d**-0.5, None, None)
    rotation = cos, sin, input_pos, interleaved
    tensors = *(ops.rope(t.transpose(1, 2), *rotation, False).transpose(1, 2) for t in (q, k)), v
    out, lse = ops.attention(*tensors, *options)
    ours = ops.attention_backward(
        grad, *tensors, out, lse, *options, kind == "deterministic", *rotation
    )
    # A query that sees one key has a gradient of zero, the difference of sums of d products.
    terms = (d * grad.abs().max() * v.abs().max()).double()
    for results in zip(ours, plain(dtype), plain(torch.float64), strict=True):
        assert results[0].transpose(1, 2).is_contiguous()
        assert_as_exact(*results, dtype, terms)


@pytest.mark.parametrize(
    "dtype, d", [(torch.float32, 64), (torch.float64, 32), (torch.bfloat16, 20), (torch.half, 264)]
)
def test_what_has_no_kernel_is_still_right(check, dtype, d):
    tensors = qkv(2, 6, 2, 70, d, dtype=dtype)
    mask = random_mask(2, 70, 70)
    mask[0, 3] = False
    for options in (
        *({"causal": True}, {"mask": mask}, {"causal": True, "softcap": 2.0}),
        {"documents": documents(2, 70), "window": 9},
    ):
        check(tensors, **options)
    tiled = attention(*tensors, mask_tiles(mask))
    assert torch.equal(tiled, attention(*tensors, mask))
