import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import qk_norm_rope, rope

MAX_LEN, EPS = 512, 1e-5
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tables(d, dtype=torch.float32):
    angles = torch.rand(MAX_LEN, d // 2, device="cuda") * 6.28
    table = torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)  # as torchtune's cache
    return table[..., 0], table[..., 1]


@pytest.fixture
def plain(plain_rotation):
    """By the definitions, in the precision of the arguments."""

    def of(q, k, *norms, angles, input_pos, interleaved, norm_before_rope):
        def norm(x, weight):
            return x if weight is None else F.rms_norm(x, x.shape[-1:], weight, EPS)

        def rotate(x):
            return plain_rotation(x, *angles, input_pos, interleaved=interleaved)

        def heads(x, weight):
            return rotate(norm(x, weight)) if norm_before_rope else norm(rotate(x), weight)

        q_norm, k_norm = norms or (None, None)
        return heads(q, q_norm), heads(k, k_norm)

    return of


def ours(q, k, *norms, angles, input_pos, interleaved, norm_before_rope):
    return qk_norm_rope(
        *(q, k, *angles, input_pos),
        interleaved=interleaved,
        head_norms=norms or None,
        eps=EPS,
        norm_before_rope=norm_before_rope,
    )


def with_gradients(function, tensors, grads, kwargs, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves, **kwargs)
    grads = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def heads_in_one_buffer(b, s, h, h_kv, d, dtype):
    """Queries and keys as a projection of queries, keys and values leaves them."""
    qkv = torch.randn(b, s, h + 2 * h_kv, d, device="cuda").to(dtype)
    return qkv[:, :, :h], qkv[:, :, h : h + h_kv]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize(
    "b, s, h, h_kv, d",
    [
        (1, 1, 1, 1, 64),
        (2, 127, 32, 8, 64),
        (1, 300, 9, 3, 64),
        (3, 5, 7, 1, 80),
        (2, 31, 12, 3, 96),
        (2, 129, 32, 4, 128),
        (1, 17, 8, 8, 256),
        (1, 5, 2, 1, 512),
        # So many tokens that a warp has all heads of one.
        (3, 500, 32, 8, 64),
        (4, 500, 16, 2, 128),
        # Pair by pair: halves that are no whole vectors.
        (2, 3, 4, 2, 2),
        (1, 9, 3, 1, 18),
        (2, 11, 5, 1, 200),
    ],
)
def test_outputs_and_gradients(assert_as_exact, dtype, norm, interleaved, b, s, h, h_kv, d, plain):
    q, k = heads_in_one_buffer(b, s, h, h_kv, d, dtype)
    norms = () if norm == "none" else tuple(torch.randn(2, d, device="cuda").to(dtype))
    # As attention gives them: [b, h, s, d] in memory.
    grads = [torch.randn(b, n, s, d, device="cuda").to(dtype).transpose(1, 2) for n in (h, h_kv)]
    for input_pos in (None, torch.randint(MAX_LEN, (b, s), device="cuda")):
        kwargs = {
            "angles": tables(d),
            "input_pos": input_pos,
            "interleaved": interleaved,
            "norm_before_rope": norm == "before",
        }
        results = with_gradients(ours, (q, k, *norms), grads, kwargs)
        low = with_gradients(plain, (q, k, *norms), grads, kwargs)
        truth = with_gradients(plain, (q, k, *norms), grads, kwargs, torch.float64)
        for out, plainly, exact in zip(results, low, truth, strict=True):
            if dtype != torch.float32:
                assert_as_exact(out, plainly, exact, dtype)
                continue
            # No lower precision can judge fp32. Sums run in another order, and the norm's gradient
            # is a difference: 32 roundings of the largest value.
            atol = 32 * torch.finfo(dtype).eps * exact.abs().max().item()
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_fp64(interleaved, plain):
    q, k = heads_in_one_buffer(2, 7, 4, 2, 48, torch.float64)
    norms = tuple(torch.randn(2, 48, device="cuda", dtype=torch.float64))
    grads = [torch.randn_like(t) for t in (q, k)]
    kwargs = {
        "angles": tables(48),
        "input_pos": None,
        "interleaved": interleaved,
        "norm_before_rope": True,
    }
    tensors = (q, k, *norms)
    results = [with_gradients(f, tensors, grads, kwargs) for f in (ours, plain)]
    for a, b in zip(*results, strict=True):
        # Sums of a few numbers of order one, in another order.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float16])
def test_tables_and_norms_of_another_dtype(table_dtype, norm_dtype):
    q, k = heads_in_one_buffer(2, 9, 4, 2, 64, torch.bfloat16)
    norms = tuple(torch.randn(2, 64, device="cuda").to(norm_dtype))
    angles = tables(64, table_dtype)
    kwargs = {"input_pos": None, "interleaved": True, "norm_before_rope": False}
    outputs = ours(q, k, *norms, angles=angles, **kwargs)
    exact = ours(
        q, k, *(n.float() for n in norms), angles=tuple(t.float() for t in angles), **kwargs
    )
    assert all(map(torch.equal, outputs, exact))


@pytest.mark.parametrize(
    "positions",
    [
        lambda: torch.randint(MAX_LEN, (5,), device="cuda"),
        lambda: torch.randint(MAX_LEN, (1, 5), device="cuda", dtype=torch.int32),
        lambda: torch.randint(MAX_LEN, (5, 3), device="cuda").t(),
        lambda: torch.randint(MAX_LEN, (3, 5), device="cuda", dtype=torch.int32),
    ],
    ids=["s", "1 x s, int32", "strided", "b x s, int32"],
)
def test_positions(positions, plain):
    (q, k), input_pos = heads_in_one_buffer(3, 5, 4, 2, 64, torch.float32), positions()
    kwargs = {"angles": tables(64), "interleaved": False, "norm_before_rope": False}
    results = [f(q, k, input_pos=input_pos, **kwargs) for f in (ours, plain)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_tensor_alone_is_rotated_alike():
    (q, k), (cos, sin) = heads_in_one_buffer(2, 33, 6, 2, 64, torch.bfloat16), tables(64)
    outputs = qk_norm_rope(q, k, cos, sin, interleaved=True)
    for x, expected in zip((q, k), outputs, strict=True):
        assert torch.equal(rope(x, cos, sin, interleaved=True), expected)


def test_memory_that_no_vector_starts_at():
    buffer = torch.randn(2 * 3 * 5 * 64 + 1, device="cuda").bfloat16()[1:].view(2, 3, 5, 64)
    cos, sin = tables(64)
    aligned = rope(buffer.clone(), cos, sin, interleaved=False)
    assert torch.equal(rope(buffer, cos, sin, interleaved=False), aligned)
    wide = torch.randn(2, 3, 5, 128, device="cuda").bfloat16()[..., ::2]
    assert torch.equal(
        rope(wide, cos, sin, interleaved=True), rope(wide.contiguous(), cos, sin, interleaved=True)
    )


def test_a_position_beyond_the_tables_gives_nan_for_its_token_only():
    (q, k), (cos, sin) = heads_in_one_buffer(1, 4, 2, 1, 64, torch.bfloat16), tables(64)
    input_pos = torch.tensor([0, MAX_LEN, -1, MAX_LEN - 1], device="cuda")
    for out in qk_norm_rope(q, k, cos, sin, input_pos, interleaved=True):
        assert out[:, 1:3].isnan().all()
        assert out[:, [0, 3]].isfinite().all()


def test_gradients_of_the_norms_are_deterministic():
    q, k = heads_in_one_buffer(2, 2000, 16, 4, 128, torch.bfloat16)
    norms = tuple(torch.randn(2, 128, device="cuda"))
    grads = [torch.randn_like(t) for t in (q, k)]
    kwargs = {
        "angles": tables(128),
        "input_pos": torch.randint(MAX_LEN, (2, 2000), device="cuda"),
        "interleaved": False,
        "norm_before_rope": True,
    }
    first, *others = (with_gradients(ours, (q, k, *norms), grads, kwargs) for _ in range(4))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_heads_too_large_are_refused():
    x, (cos, sin) = torch.randn(1, 2, 1, 514, device="cuda"), tables(514)
    with pytest.raises(RuntimeError, match="d even and at most 512"):
        rope(x, cos, sin, interleaved=True)
