import pytest
import torch

from torchtune_fused.ops.decode_gated import _reference as gated_reference
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import _reference as linear_reference
from torchtune_fused.ops.decode_linear import decode_linear

DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [1, 2, 3, 5, 8, 11, 16]
# (n, k): tiles that divide, tails in n and in k, k shorter than one chunk for each warp, and k so
# long that more than a few tokens don't fit into shared memory.
SHAPES = [(2048, 2048), (37, 72), (1000, 1160), (129, 4096), (520, 14336), (16, 8)]


def normal(*shape, dtype, scale=1.0):
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("surrounded", [False, True])
def test_linear(assert_as_exact, dtype, tokens, n, k, surrounded):
    x = normal(tokens, 1, k, dtype=dtype, scale=3.0)
    weight = normal(n, k, dtype=dtype, scale=k**-0.5)
    bias = normal(n, dtype=dtype) if surrounded else None
    residual = normal(tokens, 1, n, dtype=dtype) if surrounded else None
    norm_weight = normal(k, dtype=dtype) if surrounded else None
    arguments = (x, weight, bias, residual, norm_weight)
    for fp32_out in (False, True):
        out = decode_linear(
            x,
            weight,
            bias,
            residual=residual,
            norm_weight=norm_weight,
            eps=1e-5,
            fp32_out=fp32_out,
        )
        assert out.dtype == (torch.float32 if fp32_out else dtype)
        plain = linear_reference(*arguments, 1e-5, fp32_out)
        truth = linear_reference(*doubles(*arguments), 1e-5, False)
        assert_as_exact(out, plain, truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
@pytest.mark.parametrize("n, k", [(8192, 2048), (37, 72), (1003, 1160), (130, 4096)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
def test_gated(assert_as_exact, dtype, tokens, n, k, activation):
    x = normal(1, tokens, k, dtype=dtype, scale=3.0)
    w_gate = normal(n, k, dtype=dtype, scale=2 * k**-0.5)
    w_up = normal(n, k, dtype=dtype, scale=2 * k**-0.5)
    b_gate, b_up = normal(n, dtype=dtype), normal(n, dtype=dtype)
    norm_weight = normal(k, dtype=dtype)
    arguments = (x, w_gate, w_up, b_gate, b_up, norm_weight)
    out = decode_gated(*arguments[:5], norm_weight=norm_weight, eps=1e-5, activation=activation)
    plain = gated_reference(*arguments, 1e-5, activation)
    truth = gated_reference(*doubles(*arguments), 1e-5, activation)
    assert_as_exact(out, plain, truth, dtype)


def test_nan_in_one_token_stays_there():
    x = normal(4, 1, 256, dtype=torch.bfloat16)
    weight, norm_weight = normal(64, 256, dtype=torch.bfloat16), normal(256, dtype=torch.bfloat16)
    x[2, 0, 77] = torch.nan
    out = decode_linear(x, weight, norm_weight=norm_weight)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=(17, 64)), "at most 16 tokens"),
        (dict(x=(2, 60), weight=(32, 60)), "multiple of 8"),
        (dict(dtype=torch.float32), "float16 or bfloat16"),
        (dict(transposed=True), "contiguous"),
    ],
)
def test_bad_input_is_refused(change, message):
    dtype = change.get("dtype", torch.bfloat16)
    x = normal(*change.get("x", (2, 64)), dtype=dtype)
    weight = normal(*change.get("weight", (64, 64)), dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        decode_linear(x, weight.t() if "transposed" in change else weight)


def test_norm_takes_what_is_near_the_end_of_fp16():
    x = torch.full((1, 1, 512), 6e4, device="cuda", dtype=torch.float16)
    weight = torch.full((16, 512), 1 / 512, device="cuda", dtype=torch.float16)
    scale = torch.full((512,), 100.0, device="cuda", dtype=torch.float16)
    out = decode_linear(x, weight, norm_weight=scale)
    torch.testing.assert_close(out, torch.full_like(out, 100.0))  # exact but for the last rounding
