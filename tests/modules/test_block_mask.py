import gc
import types
import weakref

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torchtune.modules import attention_utils

from torchtune_fused.modules import block_mask
from torchtune_fused.modules.block_mask import (
    block_tiles,
    dense_mask,
    document_ids,
    mask_arguments,
    tiles_of,
)
from torchtune_fused.ops import mask_tiles
from torchtune_fused.ops.attention_mask import visible

LENGTHS = [torch.tensor([100, 1, 49]), torch.tensor([3, 147, 0])]
S = 150


def packed_mask(lengths):
    """What torchtune's packed_block_causal_mask returns, which it does only where there is a GPU.

    The rule is torchtune's own code.
    """
    code = next(
        constant
        for constant in attention_utils.packed_block_causal_mask.__code__.co_consts
        if isinstance(constant, types.CodeType) and constant.co_name == "mask_mod"
    )
    ids = attention_utils._get_document_ids_from_seq_lens(lengths)
    rule = types.FunctionType(code, vars(attention_utils), closure=(types.CellType(ids),))
    return create_block_mask(rule, *(ids.shape[0], None, S, S), device="cpu")


def window_mask(window=7, **options):
    def rule(b, h, q, k):
        return (q >= k) & (q - k < window)

    return create_block_mask(rule, None, None, S, S, device="cpu", **options)


def window_truth(window=7):
    ones = torch.ones(1, 1, S, S, dtype=torch.bool)
    return ones.tril() & ones.triu(1 - window)


def test_packed_documents_are_recognised():
    mask = packed_mask(LENGTHS)
    arguments = mask_arguments(mask)
    assert arguments.keys() == {"documents", "causal"} and arguments["causal"]
    seen = visible(S, S, None, True, None, arguments["documents"], torch.device("cpu"))
    expected = attention_utils.create_block_causal_mask(LENGTHS)
    assert torch.equal(seen[:, 0], expected)
    assert torch.equal(dense_mask(mask)[:, 0], expected)
    assert mask_arguments(mask)["documents"] is arguments["documents"]


def test_other_rules_are_not_taken_for_packed_documents():
    ids = torch.zeros(2, S, dtype=torch.int64)

    def mask_mod(b, h, q_idx, kv_idx):
        document_ids = ids
        return document_ids[b, q_idx] == document_ids[b, kv_idx]

    for mask in (
        window_mask(),
        create_block_mask(mask_mod, 2, None, S, S, device="cpu"),
        packed_mask(LENGTHS)[:, :, :1],  # the first queries only
    ):
        assert document_ids(mask) is None


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_any_block_mask_becomes_tiles(chunk, monkeypatch):
    monkeypatch.setattr(block_mask, "_CHUNK", chunk)
    per_head = create_block_mask(
        lambda b, h, q, k: (q + b) % (h + 2) <= k, 2, 3, S, 70, device="cpu"
    )
    b, h, q, k = torch.meshgrid(*map(torch.arange, (2, 3, S, 70)), indexing="ij")
    for mask, truth in (
        (window_mask(), window_truth()),
        (packed_mask(LENGTHS), attention_utils.create_block_causal_mask(LENGTHS).unsqueeze(1)),
        (per_head, (q + b) % (h + 2) <= k),
    ):
        for ours, expected in zip(block_tiles(mask), mask_tiles(truth), strict=True):
            assert torch.equal(ours, expected)
        assert torch.equal(dense_mask(mask), truth)


def test_blocks_without_a_rule():
    whole = window_mask(1, BLOCK_SIZE=64)
    mask = BlockMask.from_kv_blocks(
        whole.kv_num_blocks, whole.kv_indices, BLOCK_SIZE=64, seq_lengths=(S, S)
    )
    row = torch.arange(S)
    assert torch.equal(dense_mask(mask)[0, 0], row.unsqueeze(1) // 64 == row // 64)


def test_layers_share_what_is_made_of_a_mask():
    dense = torch.rand(2, S, S) < 0.5
    for make, mask in (
        (tiles_of, dense),
        (dense_mask, window_mask()),
        (block_tiles, window_mask()),
    ):
        shared = make(mask)
        assert make(mask) is shared
    dense[0, 0] = ~dense[0, 0]
    changed = tiles_of(dense)
    assert all(torch.equal(*pair) for pair in zip(changed, mask_tiles(dense), strict=True))
    kept = weakref.ref(changed.bits)
    del dense, changed, shared
    gc.collect()
    assert kept() is None


def test_what_inference_mode_made_is_not_kept():
    mask = torch.rand(1, S, S) < 0.5
    with torch.inference_mode():
        inside = tiles_of(mask)
        inner = torch.rand(1, S, S) < 0.5
        tiles_of(inner)
        inner.logical_not_()
        assert torch.equal(tiles_of(inner).bits, mask_tiles(inner).bits)
    outside = tiles_of(mask)
    assert torch.equal(outside.bits, inside.bits)
    assert not outside.bits.is_inference()
    assert torch.equal(tiles_of(inner).bits, mask_tiles(inner).bits)


@pytest.mark.parametrize(
    "masks",
    [
        lambda: [packed_mask(LENGTHS), packed_mask(LENGTHS[::-1])],
        lambda: [window_mask()],
        lambda: [torch.rand(2, S, S) < 0.5, torch.rand(2, S, S) < 0.5],
    ],
    ids=["packed", "window", "dense"],
)
def test_under_torch_compile(masks):
    def arguments(mask):
        return mask_arguments(mask).get("documents", 0), mask_arguments(mask).get("mask", 0)

    compiled = torch.compile(arguments, fullgraph=True, backend="aot_eager")
    compiled(masks()[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for mask in masks():
            for ours, expected in zip(compiled(mask), arguments(mask), strict=True):
                torch.testing.assert_close(ours, expected, rtol=0, atol=0)
