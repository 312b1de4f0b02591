"""What ops answer to `create_graph=True`: an error, not a gradient that is missing terms."""

import pytest
import torch

from torchtune_fused import ops

X = torch.randn(2, 5, 8)
WEIGHT = torch.randn(8, 8)
LAYER = ops.AdaptedLinear(WEIGHT)

CALLS = {
    "rms_norm": lambda x: ops.rms_norm(x, WEIGHT[0]),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, X, WEIGHT[0])[1],
    "add_rms_norm without residual": lambda x: ops.add_rms_norm(x, None, WEIGHT[0])[0],
    "attention": lambda x: ops.attention(*(x.unflatten(-1, (2, 4)).transpose(1, 2),) * 3),
    "gated_mlp": lambda x: ops.gated_mlp(x, WEIGHT, WEIGHT, WEIGHT),
    "qkv_linear": lambda x: ops.qkv_linear(x, LAYER, LAYER, LAYER)[0],
    "rotary_self_attention": lambda x: ops.rotary_self_attention(
        x, LAYER, LAYER, LAYER, WEIGHT[:, :2], WEIGHT[:, 2:4], interleaved=True
    ),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, WEIGHT, torch.zeros(2, 5, dtype=torch.int64)
    ),
    "qk_norm_rope with norms": lambda x: ops.qk_norm_rope(
        *(x.unflatten(-1, (2, 4)),) * 2,
        *(WEIGHT[:, :2],) * 2,
        interleaved=True,
        head_norms=(WEIGHT[0, :4],) * 2,
    )[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_an_op_without_second_derivative_says_so(name):
    x = X.clone().requires_grad_()
    out = CALLS[name](x).square().sum()
    torch.autograd.grad(out, x, retain_graph=True)
    with pytest.raises(NotImplementedError, match=f"{name}.* has no second derivative"):
        torch.autograd.grad(out, x, create_graph=True)
