"""Attention of one token with the output projection behind it, against both in fp64."""

import pytest
import torch

from torchtune_fused.ops import decode_attend, decode_qkv
from torchtune_fused.ops.attention_decode import _reference


def normal(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype)


def attend(q, caches, length, mask, weight, bias, residual):
    """In the precision of q throughout."""
    group = q.shape[1] // caches[0].shape[1]
    k, v = (c[:1, :, :length].repeat_interleave(group, 1) for c in caches)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[..., :length], -torch.inf)
    seen = scores.softmax(-1).nan_to_num() @ v
    return torch.nn.functional.linear(seen.transpose(1, 2).flatten(2), weight, bias) + residual


def check(assert_as_exact, dtype, d, heads, kv_heads, length, max_len, masked=False, rows=1):
    caches = [normal(rows, kv_heads, max_len, d, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, length:] = torch.nan
    n, k = 72, heads * d
    q, residual = normal(1, heads, 1, d, dtype=dtype) * 3, normal(1, 1, n, dtype=dtype)
    weight, bias = normal(n, k, dtype=dtype) / k**0.5, normal(n, dtype=dtype)
    mask = torch.rand(1, 1, max_len, device="cuda") < 0.3 if masked else None
    device_length = torch.tensor([length], device="cuda")
    out = decode_attend(q, *caches, device_length, weight, bias, residual=residual, mask=mask)
    full = None if mask is None else mask.unsqueeze(1)
    wide = [c.double() for c in caches]
    seen = _reference(q.double(), *wide, device_length, full, d**-0.5, None)
    truth = seen.transpose(1, 2).flatten(2) @ weight.double().T + bias.double() + residual.double()
    plain = attend(q, caches, length, mask, weight, bias, residual)
    assert_as_exact(out, plain, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (32, 8), (7, 1), (8, 1)])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 65, 257, 768, 769, 1024])
def test_short_caches(assert_as_exact, dtype, heads, kv_heads, length):
    check(assert_as_exact, dtype, 64, heads, kv_heads, length, 1024)


@pytest.mark.parametrize("length, max_len", [(1, 1), (3, 5), (64, 64), (2047, 2048), (7001, 8192)])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_and_odd_caches(assert_as_exact, length, max_len, masked):
    check(assert_as_exact, torch.bfloat16, 64, 8, 2, length, max_len, masked, rows=2)


@pytest.mark.parametrize("d, heads, kv_heads", [(80, 4, 2), (64, 16, 1), (128, 8, 2)])
def test_shapes_that_go_to_the_two_ops(assert_as_exact, d, heads, kv_heads):
    check(assert_as_exact, torch.bfloat16, d, heads, kv_heads, 100, 128)


def test_a_token_that_sees_nothing_gives_the_residual():
    q, caches = torch.ones(1, 2, 1, 64, device="cuda").half(), torch.ones(2, 1, 1, 40, 64).cuda()
    weight, residual = torch.ones(8, 128, device="cuda").half(), torch.rand(1, 1, 8).cuda().half()
    mask = torch.zeros(1, 1, 40, dtype=torch.bool, device="cuda")
    length = torch.tensor([33], device="cuda")
    out = decode_attend(q, *caches.half(), length, weight, residual=residual, mask=mask)
    assert torch.equal(out, residual)


def test_captured_after_the_projection_it_equals_eager_bit_for_bit():
    """In a graph it reads old slots and the length before the projection has ended."""
    dtype, heads, kv_heads, d, dim, max_len = torch.bfloat16, 8, 2, 64, 512, 512
    weights = [normal(h * d, dim, dtype=dtype) / dim**0.5 for h in (heads, kv_heads, kv_heads)]
    out_weight = normal(dim, heads * d, dtype=dtype) / (heads * d) ** 0.5
    cache_pos, x = torch.arange(max_len, device="cuda"), normal(1, 1, dim, dtype=dtype)

    def trace(captured):
        torch.manual_seed(0)
        caches = [normal(1, kv_heads, max_len, d, dtype=dtype) for _ in range(2)]
        state, found = x.clone(), []
        cache_pos.copy_(torch.arange(max_len, device="cuda"))

        def step():
            h = state
            for _ in range(3):
                q = decode_qkv(h, *weights, *caches, cache_pos)
                h = decode_attend(q, *caches, cache_pos[1:2], out_weight, residual=h)
            state.copy_(h / h.norm() * dim**0.5)
            cache_pos.add_(1)

        run = step
        if captured:
            before = [t.clone() for t in (*caches, state, cache_pos)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            for t, old in zip((*caches, state, cache_pos), before, strict=True):
                t.copy_(old)
            run = graph.replay
        for _ in range(200):
            run()
            found.append(state.clone())
        return torch.stack(found)

    eager = trace(captured=False)
    assert eager.isfinite().all()
    assert torch.equal(eager, trace(captured=True))
