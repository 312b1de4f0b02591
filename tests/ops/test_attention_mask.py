import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtune_fused.ops import attention_decode, document_bounds, mask_tiles
from torchtune_fused.ops.attention_mask import EMPTY, FULL, PARTIAL, TILE, dense_mask


def bit(bits, row, key):
    return bits[row, key // 32].item() >> key % 32 & 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tiles_say_what_the_mask_says(data):
    integers = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    b, h, s, s_kv = integers(1, 2), integers(1, 2), integers(1, 140), integers(1, 140)
    torch.manual_seed(integers(0, 2**31))
    mask = torch.rand(b, h, s, s_kv) < data.draw(st.sampled_from([0.0, 0.5, 0.999, 1.0]))
    if data.draw(st.booleans()):
        mask[..., : s_kv // 2] = data.draw(st.booleans())
    kinds, bits = mask_tiles(mask)

    assert bits.dtype == torch.int32 and kinds.dtype == torch.uint8
    assert bits.shape == (b, h, s, 2 * -(-s_kv // TILE))
    assert torch.equal(dense_mask(bits, kinds, s_kv), mask)
    assert not dense_mask(bits, kinds, 32 * bits.shape[-1])[..., s_kv:].any()
    row, key = integers(0, s - 1), integers(0, s_kv - 1)
    assert bit(bits[0, 0], row, key) == mask[0, 0, row, key]
    for i, rows in enumerate(mask[-1, -1].split(TILE)):
        for j, tile in enumerate(rows.split(TILE, dim=1)):
            kind = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
            assert kinds[-1, -1, i, j] == kind
    assert kinds.shape == (b, h, i + 1, j + 1)


def test_strided_masks():
    mask = torch.rand(2, 70, 130) < 0.5
    for strided in (mask.mT.contiguous().mT, mask.repeat(1, 1, 2)[..., 130:]):
        for ours, expected in zip(mask_tiles(strided), mask_tiles(mask), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("s", [1, 3])
def test_tiles_over_a_cache(s):
    q, k, v, length = torch.randn(2, 4, s, 8), *torch.randn(2, 2, 2, 19, 8), torch.tensor([11])
    mask = torch.rand(2, s, 19) < 0.5
    expected = attention_decode(q, k, v, length, mask)
    assert torch.equal(attention_decode(q, k, v, length, mask_tiles(mask)), expected)


def test_document_bounds():
    ids = torch.tensor([[4, 4, 4, 7, 9, 9], [0, 0, 0, 0, 0, 0]])
    start = [[0, 0, 0, 3, 4, 4], [0] * 6]
    end = [[3, 3, 3, 4, 6, 6], [6] * 6]
    bounds = document_bounds(ids.t().contiguous().t())
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [start, end]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 3, 3), TypeError, "mask must be bool"),
        (torch.zeros(3, 3, dtype=torch.bool), ValueError, r"got \[3, 3\]"),
    ],
    ids=["dtype", "dimensions"],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        mask_tiles(mask)
