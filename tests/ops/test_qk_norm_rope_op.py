import pytest
import torch
import torch.nn.functional as F
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

from torchtune_fused.ops import qk_norm_rope

MAX_LEN, EPS = 40, 1e-5


def tables(d):
    angles = torch.arange(MAX_LEN).outer(10_000.0 ** (-torch.arange(0, d, 2) / d))
    return angles.cos(), angles.sin()


@pytest.fixture
def plain(plain_rotation):
    """By the definitions of norm and rotation, in the precision of the arguments."""

    def of(q, k, q_norm=None, k_norm=None, *, input_pos=None, interleaved, norm_before_rope):
        d = q.shape[-1]

        def norm(x, weight):
            return x if weight is None else F.rms_norm(x, (d,), weight, EPS)

        def rotate(x):
            return plain_rotation(x, *tables(d), input_pos, interleaved=interleaved)

        def heads(x, weight):
            return rotate(norm(x, weight)) if norm_before_rope else norm(rotate(x), weight)

        return heads(q, q_norm), heads(k, k_norm)

    return of


def ours(q, k, q_norm=None, k_norm=None, *, input_pos=None, interleaved, norm_before_rope):
    return qk_norm_rope(
        q,
        k,
        *tables(q.shape[-1]),
        input_pos,
        interleaved=interleaved,
        head_norms=None if q_norm is None else (q_norm, k_norm),
        eps=EPS,
        norm_before_rope=norm_before_rope,
    )


def joined(function, kwargs):
    """Queries and keys as one output, so that each has a gradient of its own."""
    return lambda *tensors: torch.cat([t.flatten() for t in function(*tensors, **kwargs)])


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("norm", ["none", "after", "before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (2, 7, 3, 1, 64), (1, 31, 8, 2, 80), (3, 2, 7, 7, 96)], ids=str
)
def test_outputs_and_gradients(
    interleaved, norm, dtype, shape, obeys_the_rule, run_with_grads, plain
):
    b, s, h, h_kv, d = shape
    heads = torch.randn(b, s, h, d, dtype=dtype), torch.randn(b, s, h_kv, d, dtype=dtype)
    norms = () if norm == "none" else (torch.randn(d, dtype=dtype), torch.randn(d, dtype=dtype))
    grad = torch.randn(b * s * (h + h_kv) * d)
    for input_pos in (None, torch.randint(MAX_LEN, (b, s))):
        kwargs = {
            "input_pos": input_pos,
            "interleaved": interleaved,
            "norm_before_rope": norm == "before",
        }
        tensors = (*heads, *norms)
        obeys_the_rule(
            run_with_grads(joined(ours, kwargs), tensors, grad),
            run_with_grads(joined(plain, kwargs), tensors, grad),
            run_with_grads(joined(plain, kwargs), tensors, grad, torch.float64),
        )


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize(
    "cls", [RotaryPositionalEmbeddings, Llama3ScaledRoPE, Qwen2RotaryPositionalEmbeddings]
)
def test_as_torchtune(cls, norms):
    rope, (q_norm, k_norm) = cls(16, max_seq_len=MAX_LEN), (RMSNorm(16, EPS), RMSNorm(16, EPS))
    interleaved = cls is not Qwen2RotaryPositionalEmbeddings
    for parameter in (q_norm.scale, k_norm.scale):
        torch.nn.init.normal_(parameter)
    q, k, input_pos = torch.randn(2, 5, 6, 16), torch.randn(2, 5, 2, 16), torch.arange(3, 8)
    if interleaved:
        cos, sin = rope.cache.unbind(-1)
    else:
        cos, _, sin, _ = rope.cache.chunk(4, -1)
    outputs = qk_norm_rope(
        *(q, k, cos, sin, input_pos),
        interleaved=interleaved,
        head_norms=(q_norm.scale, k_norm.scale) if norms else None,
        eps=EPS,
    )
    for out, x, norm in zip(outputs, (q, k), (q_norm, k_norm), strict=True):
        expected = rope(x, input_pos=input_pos)
        torch.testing.assert_close(out, norm(expected) if norms else expected)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_views_into_one_buffer(interleaved):
    # As a fused projection leaves them, here at an odd offset.
    buffer = torch.randn(1 + 2 * 5 * 8 * 16)[1:].view(2, 5, 8, 16)
    q, k = buffer[:, :, :5], buffer[:, :, 5:7]
    kwargs = {"interleaved": interleaved, "norm_before_rope": False}
    outputs = ours(q, k, **kwargs)
    assert all(out.is_contiguous() for out in outputs)
    for a, b in zip(outputs, ours(q.clone(), k.clone(), **kwargs), strict=True):
        assert torch.equal(a, b)
    whole = ours(buffer, k, **kwargs)[0]
    assert torch.equal(whole[:, :, :5], outputs[0])


@pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
@pytest.mark.parametrize("used", [0, 1], ids=["q", "k"])
def test_only_one_output_is_used(norms, used, plain):
    tensors = [torch.randn(1, 3, h, 8, requires_grad=True) for h in (4, 2)]
    tensors += [torch.randn(8, requires_grad=True) for _ in range(2)] if norms else []
    kwargs = {"interleaved": True, "norm_before_rope": True}
    grad = torch.randn(tensors[used].shape)
    expected = torch.autograd.grad(
        plain(*tensors, **kwargs)[used], tensors, grad, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(
        torch.autograd.grad(ours(*tensors, **kwargs)[used], tensors, grad), expected, strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradgradcheck():
    q, k = (torch.randn(2, 3, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))

    def rotate(q, k):
        return ours(q, k, interleaved=False, norm_before_rope=False)

    assert torch.autograd.gradcheck(rotate, (q, k))
    assert torch.autograd.gradgradcheck(rotate, (q, k))


Q, K, (COS, SIN), W = torch.zeros(1, 3, 4, 8), torch.zeros(1, 3, 2, 8), tables(8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "norms", "error", "message"),
    [
        ((Q[0], K, COS, SIN), None, ValueError, r"q and k must have shape \[b, s, heads, d\]"),
        ((Q[..., :7], K, COS, SIN), None, ValueError, "d even"),
        (
            (Q, K[:, :2], COS, SIN),
            None,
            ValueError,
            r"k must have shape \[1, 3, 2, 8\], got \[1, 2",
        ),
        ((Q, K.half(), COS, SIN), None, TypeError, "k must be torch.float32 as q is"),
        ((Q.int(), K, COS, SIN), None, TypeError, "q must be of a floating"),
        ((Q, K, COS[:, :2], SIN), None, ValueError, r"cos must have shape \[40, 4\]"),
        ((Q, K, COS[:2], SIN[:2]), None, ValueError, "q has 3 tokens, but cos and sin only 2"),
        ((Q, K, COS, SIN, torch.arange(4)), None, ValueError, "input_pos must have 3 or 1 x 3"),
        ((Q, K, COS, SIN, torch.tensor([0, 1, 40])), None, ValueError, "positions from 0 to 40"),
        ((Q, K, COS, SIN), (W, W[:4]), ValueError, r"k_norm must have shape \[8\], got \[4\]"),
        ((Q, K, COS, SIN), (W.int(), W), TypeError, "q_norm must be of a floating"),
        ((Q, K, COS, SIN), (W, W.to("meta")), ValueError, "k_norm must be on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, norms, error, message):
    with pytest.raises(error, match=message):
        qk_norm_rope(*arguments, interleaved=True, head_norms=norms)
