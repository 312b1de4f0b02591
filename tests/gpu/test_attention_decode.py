import pytest
import torch

from torchtune_fused.ops.attention_decode import _reference, attention_decode


def normal(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype)


def poisoned_caches(dtype, rows, kv_heads, max_len, d, length, poison):
    caches = [normal(rows, kv_heads, max_len, d, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, length:] = poison
    return caches


def check(assert_as_exact, q, caches, length, mask=None, window=None):
    device_length = torch.tensor([length], device="cuda")
    out = attention_decode(q, *caches, device_length, mask, window=window)
    full = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    scale = q.shape[-1] ** -0.5
    truth = _reference(
        q.double(), *(c.double() for c in caches), device_length, full, scale, window
    )
    plain = plain_attention(q, caches, length, full, window)
    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    assert_as_exact(out, plain, truth, q.dtype)
    return out


def plain_attention(q, caches, length, mask, window):
    """In the precision of q throughout, scores and probabilities included, as eager PyTorch is."""
    b, h, s, d = q.shape
    k, v = (c[:b, :, :length].repeat_interleave(h // c.shape[1], 1) for c in caches)
    own = torch.arange(length - s, length, device="cuda").unsqueeze(1)
    slots = torch.arange(length, device="cuda")
    seen = slots <= own if mask is None else mask[..., :length]
    if window is not None:
        seen = seen & (own - slots < window)
    scores = (q @ k.mT * d**-0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (9, 3), (32, 8), (7, 1), (8, 1), (40, 2)])
@pytest.mark.parametrize("length", [1, 2, 17, 257, 1024])
def test_one_query(assert_as_exact, dtype, d, heads, kv_heads, length):
    caches = poisoned_caches(dtype, 2, kv_heads, 1024, d, length, torch.nan)
    check(assert_as_exact, normal(2, heads, 1, d, dtype=dtype), caches, length)


@pytest.mark.parametrize("batch", [1, 3, 8, 16, 33])
@pytest.mark.parametrize("length, max_len", [(61, 64), (2053, 4096), (4096, 4096)])
@pytest.mark.parametrize("poison", [torch.nan, 1e4])
def test_batches(assert_as_exact, batch, length, max_len, poison):
    caches = poisoned_caches(torch.bfloat16, batch, 2, max_len, 128, length, poison)
    check(assert_as_exact, normal(batch, 8, 1, 128, dtype=torch.bfloat16), caches, length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [2, 5, 40])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_several_queries_are_causal(assert_as_exact, dtype, steps, window):
    length = 301
    caches = poisoned_caches(dtype, 2, 3, 512, 64, length, torch.nan)
    q = normal(2, 9, steps, 64, dtype=dtype)
    check(assert_as_exact, q, caches, length, window=window)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rows, mask_heads", [(1, 1), (3, 1), (3, 8)])
@pytest.mark.parametrize("window", [None, 100])
def test_masks(assert_as_exact, d, rows, mask_heads, window):
    length, max_len = 777, 1000
    caches = poisoned_caches(torch.bfloat16, 3, 2, max_len, d, length, torch.nan)
    mask = torch.rand(rows, mask_heads, 2, max_len, device="cuda") < 0.3
    mask[0, :, 0] = False  # a query that sees nothing
    q = normal(3, 8, 2, d, dtype=torch.bfloat16)
    if mask_heads == 1:
        mask = mask.squeeze(1)
    out = check(assert_as_exact, q, caches, length, mask, window)
    assert (out[0, :, 0] == 0).all()


@pytest.mark.parametrize("window", [1, 16, 100, 5000])
def test_window(assert_as_exact, window):
    caches = poisoned_caches(torch.bfloat16, 1, 8, 2048, 128, 1999, torch.nan)
    q = normal(1, 32, 1, 128, dtype=torch.bfloat16)
    check(assert_as_exact, q, caches, 1999, window=window)


def test_strided_inputs(assert_as_exact):
    caches = [normal(2, 300, 4, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)]
    q = normal(2, 1, 3, 8, 128, dtype=torch.bfloat16)[:, :, 1].transpose(1, 2)
    check(assert_as_exact, q, caches, 299)


def test_calls_on_several_streams_at_once():
    # The blocks of a call wait for one another, whatever else is running: here one key head, which
    # many blocks share, beside shapes that fill the GPU, and a stream that goes first.
    calls, differences = [], []
    for priority, (batch, heads, kv_heads, d) in [
        (0, (1, 8, 1, 128)),
        (-1, (1, 16, 1, 64)),
        (0, (1, 32, 8, 128)),
        (0, (7, 9, 3, 64)),
    ]:
        caches = [normal(batch, kv_heads, 8192, d, dtype=torch.bfloat16) for _ in range(2)]
        length = torch.tensor([8000], device="cuda")
        arguments = normal(batch, heads, 1, d, dtype=torch.bfloat16), *caches, length
        calls.append(
            (torch.cuda.Stream(priority=priority), arguments, attention_decode(*arguments))
        )
    torch.cuda.synchronize()
    for _ in range(100):
        for stream, arguments, expected in calls:
            with torch.cuda.stream(stream):
                differences.append((attention_decode(*arguments) != expected).any())
    torch.cuda.synchronize()
    assert not torch.stack(differences).any()


def test_large_logits(assert_as_exact):
    caches = poisoned_caches(torch.bfloat16, 1, 2, 512, 64, 500, torch.nan)
    check(assert_as_exact, 30 * normal(1, 8, 1, 64, dtype=torch.bfloat16), caches, 500)


@pytest.mark.parametrize(
    "dtype, d", [(torch.float32, 64), (torch.float64, 48), (torch.bfloat16, 40)]
)
def test_what_has_no_fast_kernel_is_still_right(assert_as_exact, dtype, d):
    caches = poisoned_caches(dtype, 2, 2, 100, d, 71, torch.nan)
    mask = torch.rand(2, 3, 100, device="cuda") < 0.5
    q = normal(2, 6, 3, d, dtype=dtype)
    check(assert_as_exact, q, caches, 71)
    check(assert_as_exact, q, caches, 71, mask, 30)
