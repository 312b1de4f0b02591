"""Each op against PyTorch's own rules: schema, fake, autograd registration, tracing."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torchtune_fused.ops

ops = torch.ops.torchtune_fused


def randn(*shape, grad=False):
    return torch.randn(shape, requires_grad=grad)


MASK = torch.rand(2, 1, 5, 5) < 0.5
ALONE = None, None, None
TILES = torchtune_fused.ops.mask_tiles(MASK)
DOCUMENTS = torchtune_fused.ops.document_bounds(torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]]))
QKV = (2, 6, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)
MLP = (2, 5, 8), (7, 8), (7, 8), (8, 7)
CACHE = (3, 2, 11, 8)


def head():
    return randn(5, 4, grad=True), randn(7, 4, grad=True), torch.randint(7, (5,))


CALLS = {
    "adamw_": lambda: [
        *([randn(5, 3), randn(2)] for _ in range(3)),
        *([torch.rand(5, 3), torch.rand(2)], [torch.ones(()), torch.tensor(7.0)]),
        *(0.1, 0.9, 0.99, 1e-8, 0.01, False),
    ],
    "rms_norm": lambda: [randn(2, 5, 8, grad=True), randn(8, grad=True), 1e-6, False],
    "rms_norm unit offset": lambda: [randn(2, 5, 8, grad=True), randn(8, grad=True), 1e-6, True],
    "rms_norm_backward": lambda: [
        *(randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(2, 5), None, False, True),
    ],
    "rms_norm_backward skip": lambda: [
        *(randn(2, 5, 8), randn(2, 5, 8), randn(8), randn(2, 5), randn(2, 5, 8), True, False),
    ],
    "add_rms_norm": lambda: [
        *(randn(2, 5, 8, grad=True), randn(2, 5, 8, grad=True), randn(8, grad=True)),
        *(1e-6, False),
    ],
    "rope": lambda: [randn(2, 5, 3, 8, grad=True), randn(9, 4), randn(9, 4), None, True, False],
    "rope positions": lambda: [
        *(randn(2, 5, 3, 8, grad=True), randn(9, 4), randn(9, 4)),
        *(torch.randint(9, (2, 5)), False, True),
    ],
    "qk_norm_rope": lambda: [
        *(randn(2, 5, 3, 8, grad=True), randn(2, 5, 1, 8, grad=True), None, None),
        *(randn(9, 4), randn(9, 4), None, 1e-6, True, False, False),
    ],
    "qk_norm_rope norms": lambda: [
        *(randn(2, 5, 3, 8, grad=True), randn(2, 5, 1, 8, grad=True)),
        *(randn(8, grad=True), randn(8, grad=True)),
        *(randn(9, 4), randn(9, 4), torch.randint(9, (2, 5)), 1e-6, False, True, False),
    ],
    "qk_norm_rope_backward": lambda: [
        *(randn(2, 5, 3, 8), randn(2, 5, 1, 8), randn(2, 5, 3, 8), randn(2, 5, 1, 8)),
        *(randn(8), randn(8), randn(9, 4), randn(9, 4), None, 1e-6, True, False),
    ],
    "gated_mlp": lambda: [
        *(randn(*s, grad=True) for s in MLP),
        *(None, None, None, None, "silu", True),
    ],
    "gated_mlp bias": lambda: [
        *(randn(*s, grad=True) for s in (*MLP, (7,), (7,), (8,))),
        *(None, "gelu_tanh", True),
    ],
    "gated_mlp residual": lambda: [
        *(randn(*s, grad=True) for s in MLP),
        *(None, None, None, randn(2, 5, 8, grad=True), "silu", True),
    ],
    "gated_mlp inference": lambda: [
        *(randn(*s) for s in MLP),
        *(None, None, None, None, "relu", False),
    ],
    "gated_linear": lambda: [
        *(randn(*s) for s in (*MLP[:3], (2, 5, 5), (7, 3), (7, 2))),
        *("silu", True),
    ],
    "gated_linear inference": lambda: [
        *(randn(*s) for s in MLP[:3]),
        *(None, None, None, "gelu", False),
    ],
    "gated_linear_backward": lambda: [
        *(randn(*s) for s in ((5, 8), (8, 7), (5, 7), (5, 7), (5, 3), (3, 7))),
        *("silu", True),
    ],
    "gated_mlp_hidden_backward": lambda: [
        *(randn(*s) for s in ((5, 8), (8, 7), (5, 7), (5, 7))),
        *(None, None, "silu", False),
    ],
    "gated_activation": lambda: [randn(5, 7), randn(5, 7), "relu"],
    "gated_activation_backward": lambda: [*(randn(5, 7) for _ in range(3)), "gelu", True],
    "gated_activation_backward hiddenless": lambda: [
        *(randn(5, 7) for _ in range(3)),
        *("silu", False),
    ],
    "lora_linear": lambda: [
        *(randn(2, 5, 8, grad=True), None, randn(7, 8), None),
        *(randn(3, 8, grad=True), randn(7, 3, grad=True), 0.5),
    ],
    "lora_linear dropout": lambda: [
        *(randn(5, 8, grad=True), randn(5, 8, grad=True), randn(7, 8, grad=True)),
        *(randn(7, grad=True), randn(3, 8, grad=True), randn(7, 3, grad=True), 0.5),
    ],
    "lora_gated_mlp": lambda: [
        *(randn(*s, grad=True) for s in (*MLP, (7,), (7,), (8,))),
        *(randn(*s, grad=True) for s in ((2, 8), (7, 2), (3, 8), (7, 3), (2, 7), (8, 2))),
        *(None, 0.5, "silu"),
    ],
    "lora_gated_mlp residual": lambda: [
        *(*(randn(*s) for s in MLP), None, None, None),
        *(randn(*s, grad=True) for s in ((2, 8), (7, 2), (3, 8), (7, 3), (2, 7), (8, 2))),
        *(randn(2, 5, 8, grad=True), 0.5, "silu"),
    ],
    "qkv_linear": lambda: [
        *(randn(*s, grad=True) for s in ((2, 5, 8), (6, 8), (2, 8), (2, 8))),
        *(randn(6, grad=True), randn(2), None, *(None for _ in range(9)), 1.0),
    ],
    "qkv_linear adapters": lambda: [
        *(randn(2, 5, 8, grad=True), randn(6, 8), randn(2, 8), randn(2, 8), None, None, None),
        *(randn(3, 8, grad=True), None, randn(1, 8, grad=True)),
        *(randn(6, 3, grad=True), None, randn(2, 1, grad=True)),
        *(None, None, randn(2, 5, 8, grad=True), 0.5),
    ],
    "rotary_self_attention": lambda: [
        *(randn(*s, grad=True) for s in ((2, 5, 8), (48, 8), (16, 8), (16, 8))),
        *(None, None, randn(16, grad=True), *(None for _ in range(9)), 1.0),
        *(randn(9, 4), randn(9, 4), None, True, *ALONE, True, None),
    ],
    "rotary_self_attention adapters": lambda: [
        *(randn(2, 5, 8, grad=True), randn(48, 8), randn(16, 8), randn(16, 8), *ALONE),
        *(randn(3, 8, grad=True), None, randn(1, 8, grad=True)),
        *(randn(48, 3, grad=True), None, randn(16, 1, grad=True)),
        *(None, None, randn(2, 5, 8, grad=True), 0.5),
        *(randn(9, 4), randn(9, 4), torch.randint(9, (2, 5)), False),
        *(TILES.bits, TILES.kinds, DOCUMENTS, False, 3),
    ],
    "adapter_backward": lambda: [
        *([randn(5, 7), randn(5, 4)], [randn(7, 3), randn(4, 2)], randn(5, 5), 0.5),
    ],
    "adapter_gradients": lambda: [[randn(5, 7)], [randn(7, 3)], randn(5, 3), 0.5],
    "grouped_product": lambda: [
        *([randn(5, 8), randn(5, 3), randn(5, 8)], [randn(7, 8), randn(7, 3), randn(4, 8)]),
        *([2, 1], False),
    ],
    "grouped_product rotated": lambda: [
        *([randn(10, 8), randn(10, 8)], [randn(16, 8), randn(4, 8)], [1, 1], False, None),
        *(randn(9, 4), randn(9, 4), torch.randint(9, (2, 5)), True, 5),
    ],
    "grouped_product addend": lambda: [[randn(5, 8)], [randn(8, 4)], [1], True, randn(5, 4)],
    "grouped_weight_gradients": lambda: [[randn(5, 8), randn(5, 3)], randn(5, 7)],
    "weight_gradients": lambda: [[randn(5, 8), randn(5, 3)], randn(5, 7)],
    "sum_of_products": lambda: [[randn(5, 8), randn(5, 3)], [randn(8, 7), randn(3, 7)]],
    "cross_entropy_": lambda: [
        *(randn(5, 8), torch.randint(8, (5,)), randn(5), -100, 2.0, 0.1, True),
    ],
    "embedding_add_": lambda: [
        *(randn(7, 4), torch.tensor([5, 2, 5]), torch.tensor([1, 0, 2]), randn(3, 4)),
    ],
    "scale_": lambda: [randn(5, 8), randn()],
    "linear_cross_entropy": lambda: [*head(), -100, 0.0, 0.1],
    "linear_cross_entropy_backward": lambda: [
        *(randn(5), *(t.detach() for t in head()), -100, 2.0, 0.0, True, True),
    ],
    "linear_cross_entropy_sum": lambda: [*head(), -100, 0.0, 0.0, None, True, True],
    "linear_cross_entropy_sum frozen": lambda: [
        *(randn(5, 4, grad=True), randn(7, 4), torch.randint(7, (5,))),
        *(-100, 0.0, 0.0, torch.tensor(0.2), True, False),
    ],
    "attention": lambda: [*(randn(*s, grad=True) for s in QKV), *ALONE, True, 0.3, None, None],
    "attention mask": lambda: [
        *(randn(*s, grad=True) for s in QKV),
        *(MASK, None, None, False, 0.3, 2, 5.0),
    ],
    "attention tiles and documents": lambda: [
        *(randn(*s, grad=True) for s in QKV),
        *(TILES.bits, TILES.kinds, DOCUMENTS, True, 0.3, None, None),
    ],
    "attention_backward": lambda: [
        *(randn(*s) for s in (QKV[0], *QKV, QKV[0], (2, 6, 5))),
        *(MASK, None, DOCUMENTS, False, 0.3, None, 5.0, True, *ALONE, False),
    ],
    "attention_backward rotated": lambda: [
        *(randn(*s) for s in (QKV[0], *QKV, QKV[0], (2, 6, 5))),
        *(*ALONE, True, 0.3, None, None, False),
        *(randn(9, 4), randn(9, 4), torch.randint(9, (2, 5)), True),
    ],
    "attention_decode": lambda: [
        *(randn(2, 6, 1, 8), randn(*CACHE), randn(*CACHE), torch.tensor([7])),
        *(None, 0.3, None),
    ],
    "attention_decode mask": lambda: [
        *(randn(2, 6, 3, 8), randn(*CACHE), randn(*CACHE), torch.tensor([7])),
        *(torch.rand(2, 1, 3, 11) < 0.5, 0.3, 4),
    ],
    "attention_prefill": lambda: [
        *(randn(2, 6, 3, 8), randn(*CACHE), randn(*CACHE), torch.tensor([7])),
        *(None, None, 0.3, 4),
    ],
    "mask_tiles": lambda: [MASK],
    "qk_norm_rope_append": lambda: [
        *(randn(2, 3, 6, 8), randn(2, 3, 2, 8), randn(2, 3, 2, 8), randn(8), randn(8)),
        *(randn(5, 4), randn(5, 4), torch.tensor([4, 0, 2]), 1e-6, True, False),
        *(randn(*CACHE), randn(*CACHE), torch.arange(11)),
    ],
    "kv_cache_update": lambda: [
        *(randn(*CACHE), randn(*CACHE), torch.arange(11)),
        *(randn(2, 2, 3, 8), randn(2, 2, 3, 8)),
    ],
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    opcheck(getattr(ops, call.split()[0]), CALLS[call]())


def test_every_differentiable_op_under_torch_compile():
    def step(x, weight, cos, sin, w_gate, w_up, w_down):
        h, x = torchtune_fused.ops.add_rms_norm(x, None, weight)
        h, x = torchtune_fused.ops.add_rms_norm(x, h, weight)
        h = x + torchtune_fused.ops.rms_norm(h, weight)
        q = torchtune_fused.ops.rope(h.unflatten(-1, (2, 4)), cos, sin, interleaved=True)
        q = q.transpose(1, 2)
        h = torchtune_fused.ops.attention(q, q, q, causal=True).transpose(1, 2).flatten(2)
        return torchtune_fused.ops.gated_mlp(h, w_gate, w_up, w_down)

    tensors = [randn(2, 5, 8), randn(8), randn(5, 2), randn(5, 2), *(randn(*s) for s in MLP[1:])]
    for i in (0, 1, 4, 5, 6):
        tensors[i].requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grad = randn(2, 5, 8)
    results = []
    for run in (step, compiled):
        out = run(*tensors)
        results.append(
            [out, *torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grad)]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_ops_are_seen_by_dispatch_modes_without_gradients():
    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    x, weight = randn(3, 8), randn(8)
    with torch.no_grad():
        expected = torchtune_fused.ops.rms_norm(x, weight)
        with Record():
            recorded = torchtune_fused.ops.rms_norm(x, weight)
    assert seen == [ops.rms_norm.default]
    assert torch.equal(recorded, expected)
    assert torch.equal(torchtune_fused.ops.rms_norm(x, weight), expected)
