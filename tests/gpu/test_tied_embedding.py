"""The gradient of a tied embedding on the GPU, against fp64 and plain PyTorch."""

import pytest
import torch

from torchtune_fused.ops import tied_embedding

ops = torch.ops.torchtune_fused
TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def skewed(tokens, vocab):
    """Ids as text has them: some of them often, most never."""
    return (torch.rand(tokens, device="cuda") ** 6 * vocab).long()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "vocab, dim, tokens",
    [(128256, 64, 8192), (50, 100, 777), (7, 13, 5000), (1, 96, 3000), (300, 4104, 1), (5, 8, 0)],
)
def test_rows_are_added(assert_as_exact, dtype, offset, vocab, dim, tokens):
    # An offset of one element keeps the kernel from reading 16 bytes at a time.
    weight, grad = (
        torch.randn(offset + rows * dim, device="cuda").to(dtype)[offset:].view(rows, dim)
        for rows in (vocab, tokens)
    )
    ids = skewed(tokens, vocab)
    order = ids.argsort(stable=True)
    found, again = weight.clone(), weight  # of another alignment
    truth = weight.double().index_add(0, ids, grad.double())
    plain = weight + torch.ops.aten.embedding_dense_backward(grad, ids, vocab, -1, False)
    terms = weight.double().abs().index_add(0, ids, grad.double().abs()).max()
    for out in (found, again):
        ops.embedding_add_(out, ids, order, grad)
    # In any alignment, whatever the order in which blocks end.
    assert torch.equal(found, again)
    assert_as_exact(found, plain, truth, dtype, terms=8 * terms)  # 8 at a time, then those sums


def test_no_second_tensor_of_the_weights_size():
    vocab, dim = 50000, 1024
    weight = torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rows, view = tied_embedding(skewed(4096, vocab), weight)
    grad_rows, grad_view = torch.randn_like(rows), torch.randn_like(view)
    came = grad_view.data_ptr()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (grad,) = torch.autograd.grad([rows, view], [weight], [grad_rows, grad_view])
    assert grad.data_ptr() == came
    # What is as large as the 4,096 rows may be allocated: a twelfth of the weight.
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 4
