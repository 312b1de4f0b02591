"""Kernels that are launched before those ahead of them have ended read what these have written."""

from types import SimpleNamespace

import pytest
import torch

ops = torch.ops.torchtune_fused
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="only Hopper overlaps launches, and has the kernels of the products",
)
BATCH, STEPS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, RANK, VOCAB = 2, 2048, 20, 4, 64, 2816, 8, 1000
ROWS, DIM, KV_DIM = BATCH * STEPS, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
EPS = 1e-5


def normal(*shape):
    return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).bfloat16()


def weights():
    ids = torch.randint(VOCAB, (ROWS,), device="cuda")
    angles = torch.outer(torch.arange(STEPS), 1e4 ** -torch.linspace(0, 1, HEAD_DIM // 2)).cuda()
    return SimpleNamespace(
        norm=1 + normal(DIM),
        head_norm=1 + normal(HEAD_DIM),
        qkv=[normal(n, DIM) for n in (DIM, KV_DIM, KV_DIM)],
        out=normal(DIM, DIM),
        gate=normal(HIDDEN, DIM),
        up=normal(HIDDEN, DIM),
        down=normal(DIM, HIDDEN),
        low=normal(ROWS, 2 * RANK),
        adapters=[normal(KV_DIM, RANK) for _ in range(2)],
        tables=(angles.cos(), angles.sin()),
        ids=ids,
        order=ids.argsort(stable=True),
    )


def layer(x, w):
    """The ops of a layer, forward and backward, each on what others have just made: yields it."""
    normed, rstd = ops.rms_norm(x, w.norm, EPS, False)
    yield normed, rstd
    projected = ops.grouped_product([normed] * 3, w.qkv, [1, 1, 1], False)
    yield projected
    q, k, v = (t.view(BATCH, STEPS, -1, HEAD_DIM) for t in projected)
    norms, angles = (w.head_norm, w.head_norm), (*w.tables, None)
    heads = ops.qk_norm_rope(q, k, *norms, *angles, EPS, False, True, False)
    yield heads
    seen, lse = ops.attention(
        *(t.transpose(1, 2) for t in (*heads, v)), *[None] * 3, True, HEAD_DIM**-0.5, None, None
    )
    yield seen, lse
    seen = seen.transpose(1, 2).reshape(ROWS, DIM)
    (attended,) = ops.grouped_product([seen], [w.out], [1], False, x)
    yield (attended,)
    normed, total, rstd = ops.add_rms_norm(attended, x, w.norm, EPS, False)
    yield normed, total, rstd
    hidden, gate, up = ops.gated_linear(normed, w.gate, w.up, *[None] * 3, "silu", True)
    yield hidden, gate, up
    (out,) = ops.grouped_product([hidden], [w.down], [1], False, total)
    yield (out,)

    hidden, grad_gate, grad_up = ops.gated_linear_backward(
        out, w.down, gate, up, None, None, "silu", True
    )
    yield hidden, grad_gate, grad_up
    (grad,) = ops.grouped_product([grad_gate, grad_up], [w.gate, w.up], [2], True)
    yield (grad,)
    grad, grad_norm = ops.rms_norm_backward(grad, total, w.norm, rstd, out, False, True)
    yield grad, grad_norm
    grads = ops.qk_norm_rope_backward(*heads, q, k, *norms, *angles, EPS, False, True)
    yield grads
    flat = [t.reshape(ROWS, KV_DIM) for t in (grads[1], v)]
    grad_low, grad_bs = ops.adapter_gradients(flat, w.adapters, w.low, 2.0)
    yield grad_low, *grad_bs
    hidden = ops.gated_activation(grad_gate, grad_up, "silu")
    yield (hidden,)
    changed = hidden.clone()
    yield changed, *ops.gated_activation_backward(changed, grad_gate, grad_up, "silu", True)
    grad_embedding = torch.zeros(VOCAB, DIM, device="cuda", dtype=x.dtype)
    ops.embedding_add_(grad_embedding, w.ids, w.order, grad)
    yield (grad_embedding,)


def results(x, w, synchronised=False):
    found = []
    for made in layer(x, w):
        found += made
        if synchronised:
            torch.cuda.synchronize()
    return found


@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_chain_gives_the_bits_that_it_gives_with_a_synchronize_after_each_op(captured):
    w, x = weights(), normal(ROWS, DIM)
    # In turns, so that what was in memory before is never what must be there.
    inputs = [normal(ROWS, DIM) * DIM**0.5 for _ in range(2)]
    expected = [results(x.copy_(one), w, synchronised=True) for one in inputs]
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = results(x, w)
    wrong = torch.zeros(len(expected[0]), dtype=torch.bool, device="cuda")
    for i in range(200):
        x.copy_(inputs[i % 2])
        if captured:
            graph.replay()
        else:
            found = None  # its memory is written again, in the same order
            found = results(x, w)
        pairs = zip(found, expected[i % 2], strict=True)
        wrong |= torch.stack([(a != b).any() for a, b in pairs])
    assert not wrong.any()
