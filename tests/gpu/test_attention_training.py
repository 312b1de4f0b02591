"""FusedAttention inside models in training, against stock torchtune."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.attention_utils import create_block_causal_mask, packed_block_causal_mask
from torchtune.training import OffloadActivations, set_activation_checkpointing

from torchtune_fused import patch_model
from torchtune_fused.ops import attention

SIZES = {
    "vocab_size": 500,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 2,
    "embed_dim": 512,
    "intermediate_dim": 768,
    "max_seq_len": 4096,
}
S = 300
LENGTHS = [torch.tensor([100, 1, 199]), torch.tensor([3, 297])]


def build(dtype=torch.bfloat16, builder=llama3_2):
    torch.manual_seed(0)
    model = builder(**SIZES)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return model.to("cuda", dtype)


def window_mask(s=S):
    return create_block_mask(
        lambda b, h, q, k: (q >= k) & (q - k < 70), None, None, s, s, device="cuda"
    )


def dense_window(s=S):
    ones = torch.ones(1, s, s, dtype=torch.bool, device="cuda")
    return ones.tril() & ones.triu(-69)


MASKS = {  # as a model is given them, and as the dense mask that any model takes
    "none": lambda: (None, None),
    "packed": lambda: (
        packed_block_causal_mask(LENGTHS),
        create_block_causal_mask(LENGTHS).cuda(),
    ),
    "window": lambda: (window_mask(), dense_window()),
    "dense": lambda: (create_block_causal_mask(LENGTHS).cuda(),) * 2,
}


def run(model, tokens, mask, upstream):
    logits = model(tokens, mask=mask)
    logits.backward(upstream.to(logits.dtype))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [logits.detach(), *grads]


@pytest.fixture
def check(assert_as_exact):
    """A patched model, prepared in some way, is as exact as the stock one."""

    def compare(prepare, mask, builder=llama3_2):
        stock = build(builder=builder)
        fused, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
        patch_model(fused)
        context = prepare(fused)
        mask, dense = MASKS[mask]()
        tokens = torch.randint(0, SIZES["vocab_size"], (2, S), device="cuda")
        upstream = torch.randn(2, S, SIZES["vocab_size"], device="cuda")
        exact, plain = (run(model, tokens, dense, upstream) for model in (truth, stock))
        if context is None:
            results = run(fused, tokens, mask, upstream)
        else:
            with context:
                logits = fused(tokens, mask=mask)
            logits.backward(upstream.to(logits.dtype))
            results = [logits.detach(), *(p.grad for p in fused.parameters() if p.grad is not None)]
        for mine, theirs, right in zip(results, plain, exact, strict=True):
            assert_as_exact(mine, theirs, right.double(), torch.bfloat16)

    return compare


def checkpointed(model):
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})


def compiled(model):
    for layer in model.layers:
        layer.compile(fullgraph=True)


def offloading(model):
    return OffloadActivations(use_streams=False)


def eager(model):
    return None


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask(check, mask):
    check(eager, mask)


@pytest.mark.parametrize("mask", ["none", "packed"])
@pytest.mark.parametrize("prepare", [checkpointed, compiled, offloading])
def test_every_way_to_train(check, mask, prepare):
    check(prepare, mask)


def test_lora(check):
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    builder = functools.partial(lora_llama3_2, lora_attn_modules=modules, lora_rank=4, lora_alpha=8)
    check(eager, "packed", builder)


def losses(model, batches, mask_of):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for tokens, lengths, positions in batches:
        logits = model(tokens, mask=mask_of(lengths).to("cuda"), input_pos=positions)[:, :-1]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return torch.tensor(history)


def packed_batches(steps):
    for _ in range(steps):
        cuts = [sorted(torch.randint(1, S, (3,)).tolist()) for _ in range(2)]
        lengths = [torch.tensor([0, *c, S]).diff() for c in cuts]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        # Text that can be learned: each token follows from the one before.
        tokens = (torch.randint(0, 500, (2, 1)) + 7 * torch.arange(S)) % 500
        yield tokens.cuda(), lengths, positions.cuda()


def test_training_on_packed_documents_follows_stock():
    batches = list(packed_batches(32))
    stock = build()
    fused = copy.deepcopy(stock)
    patch_model(fused)
    # Stock torchtune would compile FlexAttention for the BlockMask: the dense one says the same.
    expected = losses(stock, batches, create_block_causal_mask)
    found = losses(fused, batches, packed_block_causal_mask)
    assert expected[-1] < 0.8 * expected[0]
    # bf16 has 8 bits: a loss is a mean over 600 tokens, and the two runs round differently at
    # every step, in the weights too.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", ["causal", "documents"])
def test_memory_is_linear_in_the_length(case):
    peaks = []
    for s in (32768, 131072):
        q, k, v = (
            torch.randn(1, s, h, 64, device="cuda", dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for h in (4, 1, 1)
        )
        bounds = torch.empty(2, 1, s, dtype=torch.int32, device="cuda")
        bounds[0], bounds[1] = 0, s
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        options = {"documents": bounds} if case == "documents" else {}
        attention(q, k, v, causal=True, **options).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Four times the tokens: four times the memory, and what the allocator rounds up.
    assert peaks[1] < 4.2 * peaks[0]


def test_packed_documents_cost_no_square_of_the_length():
    s = 16384
    mask = packed_block_causal_mask([torch.full((64,), s // 64)])
    model = build()
    patch_model(model)
    layer = model.layers[0].attn
    layer.pos_embeddings = None
    x = torch.randn(1, s, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer(x, x, mask=mask).sum().backward()
    # A bool for each pair of tokens alone would be as much.
    assert torch.cuda.max_memory_allocated() - before < s * s
