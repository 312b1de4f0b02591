"""Self-attention with rotary embeddings on the GPU, against fp64 and plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import AdaptedLinear, document_bounds, rotary_self_attention

HALVES = [torch.bfloat16, torch.float16]
SCALE = 2.0


def tables(length, d, interleaved):
    """Cosines and sines as torchtune keeps them."""
    angles = 6 * torch.rand(length, d // 2, device="cuda")
    parts = angles.cos(), angles.sin()
    if interleaved:
        return torch.stack(parts, -1).unbind(-1)
    cos, _, sin, _ = torch.cat([parts[0], parts[0], parts[1], parts[1]], -1).chunk(4, -1)
    return cos, sin


POSITIONS = {
    "none": lambda b, s, limit: None,
    "row": lambda b, s, limit: torch.randint(limit, (1, s), device="cuda").int(),
    "tokens": lambda b, s, limit: torch.randint(limit, (b, s), device="cuda"),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "b, s, dim, heads, kv_heads, d, ranks, bias, hidden, positions",
    [
        (2, 1031, 512, 8, 2, 64, (0, 0, 0), False, "causal", "none"),
        (3, 700, 136, 4, 4, 128, (16, 0, 8), False, "causal", "tokens"),
        (1, 2049, 64, 12, 4, 64, (8, 8, 8), False, "documents", "row"),
        (2, 517, 512, 4, 2, 256, (0, 0, 0), False, "causal", "none"),
        (2, 600, 256, 8, 8, 80, (0, 4, 0), False, "mask", "tokens"),
        (2, 600, 256, 8, 2, 128, (8, 8, 8), True, "nothing", "row"),
    ],
)
def test_output_and_gradients(
    assert_as_exact,
    plain_attention,
    plain_rotation,
    dtype,
    interleaved,
    b,
    s,
    dim,
    heads,
    kv_heads,
    d,
    ranks,
    bias,
    hidden,
    positions,
):
    limit = 3000
    cos, sin = tables(limit, d, interleaved)
    input_pos = POSITIONS[positions](b, s, limit)
    options = {
        "causal": {"causal": True},
        "documents": {
            "causal": True,
            "documents": document_bounds(torch.randint(3, (b, s), device="cuda").sort().values),
        },
        "mask": {"mask": torch.rand(b, s, s, device="cuda") < 0.5},
        "nothing": {},
    }[hidden]

    tensors = [torch.randn(b, s, dim, device="cuda").to(dtype)]
    for count, rank in zip((heads, kv_heads, kv_heads), ranks, strict=True):
        n = count * d
        for shape in ((n, dim), (rank, dim), (n, rank), (n if bias else 0,)):
            made = torch.randn(shape, device="cuda") * max(shape[-1], 1) ** -0.5
            tensors.append(made.to(dtype) if made.numel() else None)
    grad = torch.randn(b, s, heads * d, device="cuda").to(dtype)

    def rotated(heads):
        # In fp32 at least, and rounded once.
        wide = heads.double() if heads.dtype == torch.float64 else heads.float()
        turned = plain_rotation(wide, cos, sin, input_pos, interleaved=interleaved)
        return turned.to(heads.dtype)

    def plain(x, *values):
        parts = []
        for i in range(0, 12, 4):
            weight, low, up, offset = values[i : i + 4]
            out = F.linear(x, weight, offset)
            if low is not None:
                out = out + SCALE * F.linear(F.linear(x, low), up)
            out = out.unflatten(-1, (-1, d))
            turned = out if i == 8 else rotated(out)
            parts.append(turned.transpose(1, 2))
        return plain_attention(*parts, **options).transpose(1, 2).flatten(2)

    def ours(x, *values):
        layers = [AdaptedLinear(*values[i : i + 4]) for i in (0, 4, 8)]
        angles = cos, sin, input_pos
        return rotary_self_attention(
            x, *layers, *angles, interleaved=interleaved, scale=SCALE, **options
        )

    def results(function, dtype):
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        out = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(dtype))]

    truth = results(plain, torch.float64)
    for mine, theirs, exact in zip(results(ours, dtype), results(plain, dtype), truth, strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_kernels(dtype):
    x = torch.randn(2, 33, 24, device="cuda", dtype=dtype)
    layers = [AdaptedLinear(torch.randn(n, 24, device="cuda", dtype=dtype)) for n in (32, 16, 16)]
    angles = torch.rand(33, 4, device="cuda", dtype=dtype)
    tensors = x, *layers, angles.cos(), angles.sin()
    mask = torch.rand(2, 33, 33, device="cuda") < 0.5
    found = rotary_self_attention(*tensors, mask=mask, interleaved=False)
    on_cpu = [t.cpu() if torch.is_tensor(t) else AdaptedLinear(t.weight.cpu()) for t in tensors]
    expected = rotary_self_attention(*on_cpu, mask=mask.cpu(), interleaved=False)
    # fp32 sums in another order, of scores of some tens: 1e-4 of them.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)
