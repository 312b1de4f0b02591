"""The kernels behind linear layers with adapters, against fp64 and plain PyTorch."""

import pytest
import torch

from torchtune_fused.ops.adapters import adapter_backward
from torchtune_fused.ops.grouped_product import sum_of_products

ops = torch.ops.torchtune_fused
HALVES = [torch.bfloat16, torch.float16]
hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="the kernel is Hopper's",
)


def normal(*shape, dtype):
    return (torch.randn(shape, device="cuda") * shape[-1] ** -0.5).to(dtype)


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("across", [False, True], ids=["layers", "gradient"])
@pytest.mark.parametrize(
    "rows, widths, depths",
    [
        (2048, (2048, 512, 512), ((256,), (256,), (256,))),
        (4096, (1032, 520, 8), ((512, 16), (512,), (512, 8))),
        (4099, (1024,), ((72, 8, 136, 64),)),
        (8191, (768, 256), ((8,), (1000, 24))),
    ],
)
def test_sums(assert_as_exact, dtype, across, rows, widths, depths):
    firsts, seconds, terms = [], [], []
    for n, ks in zip(widths, depths, strict=True):
        firsts += [normal(rows, k, dtype=dtype) for k in ks]
        seconds += [normal(n, k, dtype=dtype) for k in ks]
        terms.append(len(ks))
    if across:
        seconds = [second.t().contiguous() for second in seconds]
    # As what adapters see: some columns of a wider matrix.
    firsts[-1] = torch.cat((firsts[-1], torch.full_like(firsts[-1], torch.nan)), 1)[
        :, : firsts[-1].shape[1]
    ]
    assert ops.grouped_product_takes(firsts, seconds, terms, across)

    def plain(dtype):
        products = iter(
            first.to(dtype) @ (second if across else second.t()).to(dtype)
            for first, second in zip(firsts, seconds, strict=True)
        )
        return [sum(next(products) for _ in range(count)) for count in terms]

    found = ops.grouped_product(firsts, seconds, terms, across)
    for mine, theirs, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("across", [False, True], ids=["layers", "gradient"])
@pytest.mark.parametrize(
    "rows, n, ks", [(8192, 2048, (2048,)), (4099, 1032, (72,)), (8193, 1000, (264, 8))]
)
def test_addend(assert_as_exact, dtype, across, rows, n, ks):
    firsts, seconds = (
        [normal(rows, k, dtype=dtype) for k in ks],
        [normal(*((k, n) if across else (n, k)), dtype=dtype) for k in ks],
    )
    addend = normal(rows, n, dtype=dtype) * n**0.5
    arguments = firsts, seconds, [len(ks)], across
    assert ops.grouped_product_takes(*arguments, addend)

    def plain(dtype):
        products = (
            first.to(dtype) @ (second if across else second.t()).to(dtype)
            for first, second in zip(firsts, seconds, strict=True)
        )
        return addend.to(dtype) + sum(products)

    kept = addend.clone()
    (found,) = ops.grouped_product(*arguments, addend)
    assert_as_exact(found, plain(dtype), plain(torch.float64), dtype)
    assert torch.equal(addend, kept)


@hopper
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(
    "b, s, k, widths, ranks, positions",
    [
        (4, 512, 2048, (2048, 512, 512), (0, 0, 0), None),
        (3, 1031, 64, (1024, 512, 520), (0, 0, 0), (1031,)),
        (1, 4099, 136, (768, 128, 264), (8, 0, 16), (1, 4099)),
        (2, 4096, 512, (1024, 256, 256), (16, 16, 16), (2, 4096)),
    ],
)
def test_rotation(assert_as_exact, dtype, interleaved, d, b, s, k, widths, ranks, positions):
    angles = 6 * torch.rand(5000, d // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        cos, sin = torch.stack((cos, sin), -1).unbind(-1)  # as torchtune keeps them
    input_pos = None if positions is None else torch.randint(5000, positions, device="cuda")
    x = normal(b * s, k, dtype=dtype)
    firsts, seconds, terms = [], [], []
    for n, rank in zip(widths, ranks, strict=True):
        firsts += [x, normal(b * s, rank, dtype=dtype)] if rank else [x]
        seconds += [normal(n, depth, dtype=dtype) for depth in ((k, rank) if rank else (k,))]
        terms.append(2 if rank else 1)
    arguments = firsts, seconds, terms, False, None, cos, sin, input_pos, interleaved, s
    assert ops.grouped_product_takes(*arguments)
    found = ops.grouped_product(*arguments)

    def plain(dtype):
        products = iter(
            first.to(dtype) @ second.to(dtype).t()
            for first, second in zip(firsts, seconds, strict=True)
        )
        *heads, v = [sum(next(products) for _ in range(count)) for count in terms]
        heads = [ops.rope(t.view(b, s, -1, d), *arguments[5:9], False) for t in heads]
        return [*(t.view(b * s, -1) for t in heads), v]

    for mine, theirs, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


@hopper
def test_positions_without_angles_turn_to_nan():
    angles = torch.rand(100, 32, 2, device="cuda")
    x = normal(8192, 256, dtype=torch.bfloat16)
    weights = [normal(512, 256, dtype=torch.bfloat16) for _ in range(3)]
    positions = torch.randint(100, (8192,), device="cuda")
    positions[77], positions[99] = 100, -1
    tables = *angles.unbind(-1), positions
    outs = ops.grouped_product([x] * 3, weights, [1, 1, 1], False, None, *tables, True, 8192)
    rows = [out.isnan().any(1).nonzero().flatten().tolist() for out in outs]
    assert rows == [[77, 99], [77, 99], []]


def test_sum_of_one_and_of_odd_sizes(assert_as_exact):
    for rows, n, ks in ((3, 5, (7,)), (1000, 33, (65, 3)), (4096, 1024, (512,))):
        firsts = [normal(rows, k, dtype=torch.bfloat16) for k in ks]
        seconds = [normal(n, k, dtype=torch.bfloat16).t() for k in ks]
        both = list(zip(firsts, seconds, strict=True))
        truth = sum(first.double() @ second.double() for first, second in both)
        theirs = sum(first @ second for first, second in both)
        assert_as_exact(sum_of_products(firsts, seconds), theirs, truth, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "rows, widths, ranks",
    [
        (4096, (4096, 1024, 1024), (16, 16, 16)),
        (1000, (520, 72), (8, 16)),
        (513, (8,), (8,)),
        (8193, (1032, 2048, 512), (8, 8, 16)),
        (700, (512,), (3,)),
    ],
)
def test_gradients_of_adapters(assert_as_exact, dtype, rows, widths, ranks):
    grads = [normal(rows, n, dtype=dtype) for n in widths]
    bs = [normal(n, rank, dtype=dtype) for n, rank in zip(widths, ranks, strict=True)]
    low = normal(rows, sum(ranks), dtype=dtype)
    assert ops.adapter_gradients_takes(grads, bs, low) == all(rank % 8 == 0 for rank in ranks)

    def plain(dtype):
        own = low.to(dtype).split(ranks, dim=1)
        pairs = list(zip(grads, bs, strict=True))
        grad_low = torch.cat([2.0 * (grad.to(dtype) @ b.to(dtype)) for grad, b in pairs], dim=1)
        return [
            grad_low,
            *(grad.to(dtype).t() @ part for grad, part in zip(grads, own, strict=True)),
        ]

    grad_low, grad_bs = adapter_backward(grads, bs, low, 2.0)
    for mine, theirs, exact in zip(
        [grad_low, *grad_bs], plain(dtype), plain(torch.float64), strict=True
    ):
        assert_as_exact(mine, theirs, exact, dtype)
    again, _ = adapter_backward(grads, bs, low, 2.0)
    assert torch.equal(again, grad_low)  # whatever the order in which blocks end
