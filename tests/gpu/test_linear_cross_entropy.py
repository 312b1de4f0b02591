"""Linear + cross-entropy on the GPU: accuracy by the rule, and the memory it promises."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import loss as stock

from torchtune_fused import patch_model
from torchtune_fused.modules import CEWithChunkedOutputLoss
from torchtune_fused.ops import linear_cross_entropy
from torchtune_fused.ops.cross_entropy import _reference, cross_entropy_

DTYPES = [torch.bfloat16, torch.float16]
# (tokens, dim, vocab): one token, sizes that divide nothing, a row longer than the shared memory of
# any GPU (fp32 included), and several chunks.
SHAPES = [(1, 64, 1), (3, 64, 7), (37, 72, 1031), (67, 128, 128256), (2500, 256, 4099)]


def problem(tokens, dim, vocab, dtype):
    hidden = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    weight = (torch.randn(vocab, dim, device="cuda") * 3 * dim**-0.5).to(dtype)
    targets = torch.randint(vocab, (tokens,), device="cuda")
    targets[1::5] = -100
    return hidden, weight, targets


def by_definition(hidden, weight, targets, softcap, z_loss, low=None):
    """PyTorch's cross-entropy of all logits, in fp32 after a head in ``low``, as in torchtune."""
    logits = hidden @ weight.t()
    if low is not None:
        logits = logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses + z_loss * logits.logsumexp(-1).square() * (targets != -100)


def run(function, hidden, weight, grad, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap, z_loss", [(None, 0.0), (5.0, 0.0), (None, 0.1), (5.0, 0.1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_losses_and_gradients(assert_as_exact, dtype, shape, softcap, z_loss, reduction):
    hidden, weight, targets = problem(*shape, dtype)

    def ours(h, w):
        return linear_cross_entropy(
            h, w, targets, softcap=softcap, z_loss=z_loss, reduction=reduction
        )

    def plain(h, w, low=dtype):
        losses = by_definition(h, w, targets, softcap, z_loss, low)
        if reduction == "none":
            return losses
        return losses.sum() / ((targets != -100).sum() if reduction == "mean" else 1)

    grad = torch.randn(shape[0] if reduction == "none" else (), device="cuda")
    found = run(ours, hidden, weight, grad)
    allowed = run(plain, hidden, weight, grad)
    truth = run(lambda h, w: plain(h, w, None), hidden, weight, grad, torch.float64)
    assert found[0].dtype == torch.float32
    for mine, theirs, exact in zip(found, allowed, truth, strict=True):
        assert_as_exact(mine, theirs, exact, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32, torch.float64])
# Rows for one block, for two and for four that share them, and one too long for shared memory.
@pytest.mark.parametrize(
    "rows, vocab", [(1, 1), (5, 8), (3, 127), (7, 4096), (5, 50003), (3, 128256), (2, 256001)]
)
@pytest.mark.parametrize("softcap, z_loss", [(0.0, 0.0), (5.0, 0.1)])
def test_one_chunk_is_what_its_reference_gives(dtype, rows, vocab, softcap, z_loss):
    padded = torch.randn(rows, -(-vocab // 8) * 8, device="cuda", dtype=dtype)
    targets = torch.randint(vocab, (rows,), device="cuda")
    targets[1::4] = 3
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(rows, device="cuda", dtype=accumulated)
    ours, theirs = padded.clone()[:, :vocab], padded[:, :vocab].clone()
    losses = cross_entropy_(ours, targets, grad, ignore_index=3, softcap=softcap, z_loss=z_loss)
    expected = _reference(theirs, targets, grad, 3, softcap, z_loss, True)
    # The same arithmetic but for the order of a sum over the vocabulary and the last bit of exp and
    # tanh; then one rounding to the dtype of the logits.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=2 * max(1e-5, torch.finfo(dtype).eps), atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_the_same_others():
    hidden, weight, targets = problem(1500, 256, 1000, torch.bfloat16)
    grads = []
    for frozen in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        linear_cross_entropy(h, w, targets).backward()
        grads.append(h.grad)
        assert (w.grad is None) == frozen
    # Other chunks, so other kernels of cuBLAS may run: a rounding of the largest value.
    torch.testing.assert_close(*grads, rtol=0, atol=2**-8 * grads[0].abs().max().item())


def test_runs_are_bitwise_the_same():
    hidden, weight, targets = problem(2500, 256, 4099, torch.bfloat16)
    first, second = (
        run(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, torch.tensor(0.7))
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocab", [1000, 64000])  # one block a row, several
def test_what_is_not_finite_shows_as_in_pytorch(value, vocab):
    logits = torch.randn(4, vocab, device="cuda")
    logits[1, 77] = value
    logits[2] = -torch.inf
    targets = torch.tensor([5, 77, 9, 11], device="cuda")
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(cross_entropy_(logits, targets), expected, equal_nan=True)


def test_a_target_that_is_no_token_has_no_number_for_a_loss():
    logits, targets = torch.randn(3, 40, device="cuda"), torch.tensor([1, 40, -1], device="cuda")
    assert cross_entropy_(logits, targets).isnan().tolist() == [False, True, True]


def test_memory_is_one_gradient_of_the_weight_and_one_chunk():
    tokens, dim, vocab = 8192, 1024, 50000
    hidden, weight, targets = problem(tokens, dim, vocab, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()  # cuBLAS takes its workspace
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets).backward()
    extra = torch.cuda.max_memory_allocated() - before
    # Both gradients, and a chunk of logits as large as the weight; a hundredth for what is small.
    assert extra <= 1.01 * (2 * weight.nbytes + hidden.nbytes)
    assert extra < tokens * vocab * 2 / 2  # far from all logits in bf16


def test_a_decoders_loss_and_gradients_are_as_exact_as_with_torchtunes(assert_as_exact):
    model = llama3_2(
        vocab_size=5003,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=256,
        max_seq_len=2048,
        intermediate_dim=512,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    model = model.to("cuda", torch.bfloat16)
    truth, fused = copy.deepcopy(model).double(), copy.deepcopy(model)
    patch_model(fused)
    tokens = torch.randint(5003, (2, 1500), device="cuda")
    labels = tokens.roll(-1, 1)
    labels[:, ::7] = -100
    results = []
    for decoder, loss in [
        (fused, CEWithChunkedOutputLoss()),
        (model, stock.CEWithChunkedOutputLoss()),
        (truth, stock.CEWithChunkedOutputLoss()),
    ]:
        decoder.set_num_output_chunks(loss.num_output_chunks)
        output = decoder(tokens)
        value = loss(output, labels)
        value.backward()
        results.append([value.detach(), *(p.grad for p in decoder.parameters())])
    for mine, theirs, right in zip(*results, strict=True):
        assert_as_exact(mine, theirs, right.double(), torch.bfloat16)
