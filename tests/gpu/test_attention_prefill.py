"""A prompt over the KV cache: many queries, and slots that must not be read."""

import pytest
import torch

from torchtune_fused.ops import attention_decode, mask_tiles


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.fixture
def check(assert_as_exact, plain_attention):
    def run(s, length, max_len, d=128, heads=8, kv_heads=2, dtype=torch.bfloat16, b=2, **options):
        q = normal(b, s, heads, d, dtype=dtype).transpose(1, 2)
        caches = [normal(b + 1, kv_heads, max_len, d, dtype=dtype) for _ in range(2)]
        filled = [cache[:b, :, :length].clone() for cache in caches]
        for cache in caches:
            cache[:, :, length:] = torch.nan
            cache[b:] = torch.nan
        slots = torch.tensor([length], device="cuda")
        out = attention_decode(q, *caches, slots, **options)
        mask, window = options.get("mask"), options.get("window")
        seen = {"causal": True} if mask is None else {"mask": mask[..., :length]}
        plain = plain_attention(q, *filled, **seen, window=window)
        truth = plain_attention(*(t.double() for t in (q, *filled)), **seen, window=window)
        assert out.transpose(1, 2).is_contiguous()
        assert_as_exact(out, plain, truth, dtype)
        if mask is not None:
            tiled = attention_decode(q, *caches, slots, mask_tiles(mask), window=window)
            assert torch.equal(tiled, out)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (8, 2), (7, 1), (8, 1)])
def test_a_whole_prompt(check, dtype, d, heads, kv_heads):
    check(257, 257, 400, d, heads, kv_heads, dtype)


@pytest.mark.parametrize("s, length, max_len", [(17, 17, 17), (40, 301, 512), (64, 1000, 1000)])
@pytest.mark.parametrize("window", [None, 1, 33])
@pytest.mark.parametrize("d", [64, 128])
def test_a_prompt_after_others(check, s, length, max_len, window, d):
    check(s, length, max_len, d, window=window)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("d", [64, 128])
def test_masks(check, rows, window, d):
    mask = torch.rand(rows, 130, 1000, device="cuda") < 0.3
    mask[0, 5] = False
    check(130, 777, 1000, d, mask=mask, window=window)
    causal = torch.ones(rows, 500, 1000, dtype=torch.bool, device="cuda").tril()
    check(500, 500, 1000, d, mask=causal, window=window)


def test_what_has_no_kernel_is_still_right(check):
    check(40, 71, 100, 64, dtype=torch.float32)
    check(40, 71, 100, 20, mask=torch.rand(1, 40, 100, device="cuda") < 0.5)
