import pytest
import torch

from torchtune_fused.ops import attention_decode
from torchtune_fused.ops.attention_decode import _reference

MAX_LEN = 19


def reference(q, k_cache, v_cache, length, mask=None, scale=None, window=None):
    mask = None if mask is None else mask.unsqueeze(1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _reference(q, k_cache, v_cache, length, mask, scale, window)


implementations = pytest.mark.parametrize(
    "run", [attention_decode, reference], ids=["cpu", "reference"]
)


def arguments(b=2, h=6, h_kv=2, s=1, d=16, length=11, rows=2, dtype=torch.float32):
    q = torch.randn(b, h, s, d, dtype=dtype)
    k_cache, v_cache = torch.randn(2, rows, h_kv, MAX_LEN, d, dtype=dtype)
    return q, k_cache, v_cache, torch.tensor([length])


def exact(attention, q, k_cache, v_cache, length, mask=None, scale=None, window=None):
    """Attention over nothing but the filled slots."""
    (b, _, s, _), length = q.shape, int(length)
    k, v = k_cache[:b, :, :length], v_cache[:b, :, :length]
    if mask is None:
        mask = torch.ones(1, s, length, dtype=torch.bool).tril(length - s)
    return attention(q, k, v, mask[..., :length], scale=scale, window=window)


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("h", "h_kv"), [(1, 1), (3, 1), (4, 4), (8, 2), (7, 1), (9, 3)])
@pytest.mark.parametrize(("s", "length"), [(1, 1), (1, MAX_LEN), (1, 11), (3, 11), (11, 11)])
@pytest.mark.parametrize("poison", [torch.nan, 1e4])
def test_output(run, dtype, h, h_kv, s, length, poison, exact_attention, obeys_the_rule):
    q, k_cache, v_cache, filled = arguments(2, h, h_kv, s, 16, length, 3, dtype)
    for cache in (k_cache, v_cache):
        cache[:, :, length:] = poison
        cache[2:] = poison  # rows beyond the batch
    for options in (
        {},
        {"window": 4, "scale": 0.3},
        {"mask": torch.rand(2, s, MAX_LEN) < 0.6},
        {"mask": torch.ones(1, s, MAX_LEN, dtype=torch.bool), "window": 2},
    ):
        plain = exact(exact_attention, q, k_cache, v_cache, filled, **options)
        truth = [t.double() for t in (q, k_cache, v_cache)]
        truth = exact(exact_attention, *truth, filled, **options)
        obeys_the_rule([run(q, k_cache, v_cache, filled, **options)], [plain], [truth])


@implementations
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
def test_head_dims(run, d, exact_attention):
    tensors = arguments(d=d)
    torch.testing.assert_close(run(*tensors), exact(exact_attention, *tensors))


@implementations
@pytest.mark.parametrize("s", [1, 2])
def test_a_query_that_sees_nothing_gives_zeros(run, s):
    mask = torch.ones(2, s, MAX_LEN, dtype=torch.bool)
    mask[1, 0] = False
    out = run(*arguments(s=s), mask)
    assert not out[1, :, 0].any()
    assert out[0].all()


@implementations
def test_a_query_that_sees_unfilled_slots_only_gives_zeros(run):
    q, k_cache, v_cache, length = arguments()
    mask = torch.zeros(2, 1, MAX_LEN, dtype=torch.bool)
    mask[..., 11:] = True
    assert not run(q, k_cache, v_cache, length, mask).any()


@implementations
def test_strided_arguments(run):
    q, k_cache, v_cache, length = arguments(s=3)
    expected = run(q, k_cache, v_cache, length)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k_cache, v_cache)]
    torch.testing.assert_close(run(*strided, length), expected)
    out = attention_decode(*(t.mT.contiguous().mT for t in (q, k_cache, v_cache)), length)
    torch.testing.assert_close(out, expected)
    assert out.transpose(1, 2).is_contiguous()


Q, K, V, LENGTH = arguments()
MASK = torch.ones(2, 1, MAX_LEN, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q[0], K, V, LENGTH), {}, ValueError, r"q must have shape \[b, h, s, d\]"),
        ((Q, K.half(), V, LENGTH), {}, TypeError, "k_cache must be torch.float32 as q is"),
        ((Q, K, V.half(), LENGTH), {}, TypeError, "v_cache must be torch.float32 as q is"),
        ((Q, K[..., :8], V, LENGTH), {}, ValueError, r"k_cache must have shape \[2, 2, 19, 16\]"),
        ((Q, K, V[:, :, :8], LENGTH), {}, ValueError, r"v_cache must have shape \[2, 2, 19, 16\]"),
        ((Q[:, :5], K, V, LENGTH), {}, ValueError, "heads of q must be a multiple"),
        ((Q, K[:1], V[:1], LENGTH), {}, ValueError, "1 rows, too few for a batch of 2"),
        ((Q.expand(-1, -1, 20, -1), K, V, LENGTH), {}, ValueError, "1 to 19 tokens"),
        ((Q, K, V, torch.tensor(5.0)), {}, TypeError, "length must be int64 with one element"),
        ((Q, K, V, torch.tensor([1, 2])), {}, TypeError, "length must be int64 with one element"),
        ((Q, K, V, torch.tensor([0])), {}, ValueError, "length must be at least 1"),
        ((Q, K, V, torch.tensor([20])), {}, ValueError, "at most 19"),
        ((Q, K, V, LENGTH.to("meta")), {}, ValueError, "length must be on cpu"),
        ((Q, K, V, LENGTH, MASK.float()), {}, TypeError, "mask must be bool"),
        ((Q, K, V, LENGTH, MASK[..., :11]), {}, ValueError, r"got \[2, 1, 11\]"),
        ((Q, K, V, LENGTH), {"window": 0}, ValueError, "window must be at least 1"),
        ((Q.requires_grad_(), K, V, LENGTH), {}, RuntimeError, "no gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, options, error, message):
    if error is not RuntimeError:
        arguments = (arguments[0].detach(), *arguments[1:])
    with pytest.raises(error, match=message):
        attention_decode(*arguments, **options)
