from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import AdaptedLinear


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def obeys_the_rule():
    """The rule of correctness: at most twice the error of plain PyTorch in the same precision."""

    def check(ours, plain, truth):
        assert len(ours) == len(plain) == len(truth)
        for a, b, exact in zip(ours, plain, truth, strict=True):
            assert a.shape == exact.shape
            assert a.dtype == b.dtype
            assert a.isfinite().all()
            error, allowed = ((t.double() - exact).abs().max().item() for t in (a, b))
            # Plain PyTorch may be exact by chance (a sum of one term): the result must still be
            # rounded to its dtype, once for each of two operations. In fp32 there is no lower
            # precision to compare with: sums run in another order, and the exp of ATen's flash
            # attention has 20 bits, 2 ** -20 being 8 times the rounding of fp32.
            roundings = 32 if a.dtype == torch.float32 else 2
            rounding = roundings * torch.finfo(a.dtype).eps * exact.abs().max().item()
            assert error <= 2 * allowed + rounding, f"error {error}, plain PyTorch's {allowed}"

    return check


@pytest.fixture
def run_with_grads():
    """The output of a function and its gradients by each tensor, for a given upstream gradient."""

    def run(function, tensors, grad, dtype=None):
        leaves = [
            t.detach().to(dtype or t.dtype).requires_grad_() if t.is_floating_point() else t
            for t in tensors
        ]
        out = function(*leaves)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype))]

    return run


@pytest.fixture(scope="session")
def projections():
    """Projections to queries, keys and values: their tensors by name, ops' layers, the truth."""

    def tensors(rows, dim, widths, ranks, dtype=torch.float32, bias=False, seen=False):
        """x; of each layer a weight, an adapter unless its rank is 0, a bias; what adapters see."""
        shapes = {"x": (*rows, dim)}
        for name, n, rank in zip("qkv", widths, ranks, strict=True):
            shapes[f"weight {name}"] = n, dim
            if rank:
                shapes[f"a {name}"], shapes[f"b {name}"] = (rank, dim), (n, rank)
            if bias:
                shapes[f"bias {name}"] = (n,)
            if rank and seen:
                shapes[f"seen {name}"] = *rows, dim
        return {
            key: torch.randn(shape, dtype=dtype) / (1 if key == "x" else shape[-1] ** 0.5)
            for key, shape in shapes.items()
        }

    def layers(named):
        """The layers, and what their adapters see."""
        parts = "weight", "a", "b", "bias"
        return (
            [AdaptedLinear(*(named.get(f"{part} {name}") for part in parts)) for name in "qkv"],
            [named.get(f"seen {name}") for name in "qkv"],
        )

    def plain(named, scale):
        """Queries, keys and values, product by product."""
        x, outputs = named["x"], []
        for name in "qkv":
            out = F.linear(x, named[f"weight {name}"], named.get(f"bias {name}"))
            if f"a {name}" in named:
                low = F.linear(named.get(f"seen {name}", x), named[f"a {name}"])
                out = out + scale * F.linear(low, named[f"b {name}"])
            outputs.append(out)
        return outputs

    return SimpleNamespace(tensors=tensors, layers=layers, plain=plain)


@pytest.fixture(scope="session")
def exact_attention():
    """Attention by its definition, in the precision of its arguments."""

    def visible(s, s_kv, mask, causal, window):
        query = torch.arange(s_kv - s, s_kv).unsqueeze(1)
        key = torch.arange(s_kv)
        seen = torch.ones(1, 1, s, s_kv, dtype=torch.bool)
        if mask is not None:
            seen = seen & (mask if mask.ndim == 4 else mask.unsqueeze(1))
        if causal:
            seen = seen & (key <= query)
        if window is not None:
            seen = seen & (query - key < window)
        return seen

    def attention(
        q, k, v, mask=None, causal=False, scale=None, window=None, documents=None, softcap=None
    ):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        seen = visible(q.shape[2], k.shape[2], mask, causal, window)
        if documents is not None:
            first = documents[0].unsqueeze(1)
            seen = seen & (first.unsqueeze(-1) == first.unsqueeze(-2))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        probs = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return probs * seen.any(-1, keepdim=True) @ v

    return attention
