import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import tied_embedding

IDS = torch.tensor([[3, 0, 3, 9], [9, 3, 1, 0]])


def gradient(embed, head, rows, dtype=torch.float32, ids=IDS):
    """The gradient of a weight by what is made of its rows, of the whole of it, or of both."""
    torch.manual_seed(1)
    weight = torch.randn(10, 6, dtype=dtype).requires_grad_()
    used, view = embed(ids, weight)
    total = 0
    if rows:
        total = total + (used * torch.randn(*ids.shape, 6, dtype=dtype)).sum()
    if head:
        # A product, as a head is: its gradient is a tensor of its own.
        total = total + (view @ torch.randn(6, 5, dtype=dtype)).square().sum()
    total.backward()
    return weight.grad


def plain(ids, weight):
    return F.embedding(ids, weight), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("head, rows", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("ids", [IDS, IDS[:, :1], IDS[:, :0], torch.tensor(4)])
def test_gradients(dtype, head, rows, ids):
    found = gradient(tied_embedding, head, rows, dtype, ids)
    torch.testing.assert_close(found, gradient(plain, head, rows, dtype, ids))


def test_gradients_add_up_in_the_tensor_that_came():
    weight, came = torch.randn(10, 6, requires_grad=True), []
    rows, view = tied_embedding(IDS, weight)
    view.register_hook(lambda grad: came.append(grad.data_ptr()))
    (rows.sum() + (view @ torch.randn(6, 5)).square().sum()).backward()
    assert came == [weight.grad.data_ptr()]


def test_rows_and_view_are_the_weights():
    weight = torch.randn(10, 6)
    rows, view = tied_embedding(IDS, weight)
    assert torch.equal(rows, weight[IDS])
    assert view.data_ptr() == weight.data_ptr() and torch.equal(view, weight)
    assert not rows.requires_grad


def test_bad_arguments():
    with pytest.raises(TypeError, match="weight must be of a floating-point dtype"):
        tied_embedding(IDS, torch.zeros(10, 6).int())
    with pytest.raises(ValueError, match="weight must have shape"):
        tied_embedding(IDS, torch.zeros(10, 6, 2))
