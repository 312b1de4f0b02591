import pytest
import torch
import torch.nn.functional as F

from torchtune_fused.ops import linear_cross_entropy

# (tokens..., dim, vocab): single ones, primes, and more than one chunk of 1024 tokens.
SHAPES = [(1, 1, 1), (3, 8, 2), (2, 3, 17, 31), (7, 127, 257), (2100, 16, 61)]
OPTIONS = [{}, {"softcap": 3.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.1}]


def problem(shape, dtype, ignore_index=-100):
    *tokens, dim, vocab = shape
    hidden = torch.randn(*tokens, dim, dtype=dtype)
    weight = (torch.randn(vocab, dim) * 2 * dim**-0.5).to(dtype)
    targets = torch.randint(vocab, tokens)
    targets.view(-1)[1::3] = ignore_index
    return hidden, weight, targets


def by_definition(
    hidden, weight, targets, ignore_index=-100, softcap=None, z_loss=0.0, reduction="mean"
):
    """PyTorch's cross-entropy of all logits, which are fp32 at least, as in torchtune."""
    logits = (hidden @ weight.t()).flatten(0, -2)
    if hidden.dtype != torch.float64:
        logits = logits.float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ids = targets.flatten()
    losses = F.cross_entropy(logits, ids, ignore_index=ignore_index, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square() * (ids != ignore_index)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() / ((ids != ignore_index).sum() if reduction == "mean" else 1)


def gradients(function, hidden, weight, grad, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (hidden, weight)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_and_gradients(dtype, shape, options, reduction, obeys_the_rule):
    hidden, weight, targets = problem(shape, dtype)
    grad = torch.randn(targets.shape if reduction == "none" else ())
    results = [
        gradients(
            lambda h, w, f=function: f(h, w, targets, reduction=reduction, **options),
            *(hidden, weight, grad, precision),
        )
        for function, precision in [
            (linear_cross_entropy, None),
            (by_definition, None),
            (by_definition, torch.float64),
        ]
    ]
    assert results[0][0].dtype == torch.float32
    obeys_the_rule(*results)


def test_gradcheck():
    hidden, weight, targets = problem((2, 3, 4, 7), torch.float64)

    def loss(h, w):
        return linear_cross_entropy(h, w, targets, softcap=2.0, z_loss=0.1, reduction="none")

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("ignore_index", [-100, 0, 5])
def test_any_index_can_be_ignored(ignore_index):
    hidden, weight, targets = problem((50, 8, 11), torch.float64, ignore_index)
    ours, theirs = (
        gradients(lambda h, w, f=f: f(h, w, targets, ignore_index), hidden, weight, torch.ones(()))
        for f in (
            lambda h, w, t, i: linear_cross_entropy(h, w, t, ignore_index=i),
            by_definition,
        )
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_a_token_that_counts(tokens, reduction):
    hidden = torch.randn(tokens, 4, requires_grad=True)
    weight, targets = torch.randn(9, 4, requires_grad=True), torch.full((tokens,), -100)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    plain = F.cross_entropy(hidden @ weight.t(), targets, reduction=reduction)
    torch.testing.assert_close(loss, plain, equal_nan=True)  # the mean of nothing is NaN
    loss.sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_weight_or_frozen_hidden_states(reduction):
    hidden, weight, targets = problem((40, 8, 11), torch.float64)
    _, grad_hidden, grad_weight = gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction).sum(),
        *(hidden, weight, torch.ones(())),
    )
    for of_hidden in (True, False):
        h = hidden.clone().requires_grad_(of_hidden)
        w = weight.clone().requires_grad_(not of_hidden)
        linear_cross_entropy(h, w, targets, reduction=reduction).sum().backward()
        torch.testing.assert_close(h.grad, grad_hidden if of_hidden else None)
        torch.testing.assert_close(w.grad, None if of_hidden else grad_weight)


def test_a_tied_weight_sums_both_gradients():
    table, ids = torch.randn(11, 8, dtype=torch.float64), torch.randint(11, (30,))
    grads = []
    for loss in (linear_cross_entropy, by_definition):
        weight = table.clone().requires_grad_()
        loss(F.embedding(ids, weight), weight, ids.roll(1)).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_strided_hidden_states():
    hidden, weight, targets = problem((6, 4, 8, 11), torch.float64)
    view = hidden.transpose(0, 1)
    ours = gradients(
        lambda h, w: linear_cross_entropy(h, w, targets.t()), view, weight, torch.ones(())
    )
    dense = gradients(
        lambda h, w: linear_cross_entropy(h, w, targets.t().contiguous()),
        *(view.contiguous(), weight, torch.ones(())),
    )
    torch.testing.assert_close(ours, dense, rtol=0, atol=0)


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = problem((40, 8, 11), torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scaled_loss_keeps_small_gradients_in_fp16():
    # Probabilities of 1e-3 / 2000 are below what fp16 holds, until a GradScaler's factor comes.
    hidden, weight, targets = problem((2000, 8, 997), torch.float16)
    factor = torch.tensor(2.0**16)
    ours = gradients(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight * 0.1, factor)
    plain, truth = (
        gradients(lambda h, w: by_definition(h, w, targets), hidden, weight * 0.1, factor, dtype)
        for dtype in (None, torch.float64)
    )
    for one, other, exact in zip(ours, plain, truth, strict=True):
        assert (one - exact).norm() <= 2 * (other - exact).norm()


def test_the_gradient_of_the_weight_is_not_copied():
    hidden, weight, targets = problem((40, 8, 11), torch.float32)
    weight.requires_grad_()
    total, _, grad_weight = torch.ops.torchtune_fused.linear_cross_entropy_sum(
        *(hidden, weight, targets, -100, 0.0, 0.0, None, False, True)
    )
    memory = grad_weight.data_ptr()
    del grad_weight
    (total * 0.5).backward()
    assert weight.grad.data_ptr() == memory


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_as_in_pytorch(value):
    hidden, weight, targets = problem((4, 3, 5), torch.float32)
    hidden[2, 1] = value
    loss = linear_cross_entropy(hidden, weight, targets, reduction="none")
    expected = by_definition(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(loss, expected, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_a_break(reduction):
    hidden, weight, targets = problem((2, 600, 16, 31), torch.float32)

    def step(h, w):
        return 0.3 * linear_cross_entropy(h * 2, w, targets, reduction=reduction).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager = gradients(step, hidden, weight, torch.ones(()))
    traced = gradients(compiled, hidden, weight, torch.ones(()))
    for a, b in zip(eager, traced, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 4).int()}, TypeError, "hidden must be of a floating"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must have shape \[9, 4\]"),
        ({"weight": torch.zeros(9, 4).half()}, TypeError, "weight must be torch.float32"),
        ({"targets": torch.zeros(4).long()}, ValueError, r"targets must have shape \[3\]"),
        ({"targets": torch.zeros(3).int()}, TypeError, "targets must be torch.int64"),
        ({"targets": torch.tensor([0, 9, 1])}, RuntimeError, "out of bounds"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | change))
