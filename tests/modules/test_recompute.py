import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchtune_fused.modules.recompute import recompute

X, W = torch.randn(5, 8), torch.randn(3, 8)


class Counted:
    """The sine of a leaf, and how often it was asked for."""

    def __init__(self):
        self.x = X.clone().requires_grad_()
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.x.sin()


def readers(y, w):
    """Nodes that save y: as it is, as views of all of it, and twice in one node."""
    return (y @ w.t()).sum() + (y.view(1, 40) * y.view(40, 1)).mean() + (y.unsqueeze(0) ** 3).sum()


def gradients(loss, leaves, **kwargs):
    return torch.autograd.grad(loss, leaves, **kwargs)


def test_the_same_gradients_without_keeping_the_tensor():
    sine, w = Counted(), W.clone().requires_grad_()
    y = sine()
    kept = weakref.ref(y)
    with recompute(y, sine):
        loss = readers(y, w)
    loss = loss + loss.exp().log()  # outside, everything is as usual
    del y
    assert kept() is None
    plain = readers(sine(), w)
    expected = gradients(plain + plain.exp().log(), (sine.x, w))
    assert sine.calls == 2
    for _ in range(2):
        found = gradients(loss, (sine.x, w), retain_graph=True)
        assert all(map(torch.equal, found, expected))
    assert sine.calls == 4  # once in each backward pass, for all readers


def test_other_tensors_are_kept_as_they_are():
    sine, w = Counted(), W.clone().requires_grad_()
    y = sine()
    with recompute(y, sine):
        out = (y[1:] @ w.t()).exp()  # a part of y, and a node that saves its own output
    expected = gradients((sine.x.sin()[1:] @ w.t()).exp().sum(), (sine.x, w))
    assert all(map(torch.equal, gradients(out.sum(), (sine.x, w)), expected))
    assert sine.calls == 1
    kept = weakref.ref(out)
    del out
    assert kept() is None  # its node, which saved it, did not keep it


def test_changes_in_place_are_noticed():
    sine, w = Counted(), W.clone().requires_grad_()
    y = sine()
    with recompute(y, sine):
        loss = (y @ w.t()).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="was modified in place: it is at version 1, not 0"):
        loss.backward()


@pytest.mark.parametrize("who", ["checkpoint", "offloading", "no gradients", "hooks disabled"])
def test_others_decide_what_is_kept(who):
    def run(x):
        y = x.sin()
        with recompute(y, lambda: 1 / 0):
            return (y @ W.t()).exp().sum()

    x = X.clone().requires_grad_()
    (expected,) = gradients((x.sin() @ W.t()).exp().sum(), x)
    if who == "checkpoint":
        loss = checkpoint(run, x, use_reentrant=False)
    elif who == "offloading":
        with torch.autograd.graph.save_on_cpu():
            loss = run(x)
    elif who == "hooks disabled":
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            loss = run(x)
    else:
        with torch.no_grad():
            assert run(x).isfinite()
        return
    assert torch.equal(gradients(loss, x)[0], expected)
