import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def assert_same():
    """Two modules give the same output and gradients, of inputs and of all parameters."""

    def check(fused, stock, inputs, call=lambda module, x: module(x), stock_call=None):
        results = []
        grad = None
        for module, run in ((fused, call), (stock, stock_call or call)):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            module.zero_grad()
            torch.manual_seed(1)  # for dropout
            out = run(module, *leaves)
            grad = torch.randn_like(out) if grad is None else grad
            out.backward(grad)
            gradients = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
            gradients |= {name: p.grad for name, p in module.named_parameters()}
            results.append({"output": out.detach(), **gradients})
        ours, theirs = results
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            if expected is None:  # of a frozen parameter
                assert ours[name] is None, f"{name} has a gradient"
                continue
            # fp32, with sums in another order and an exp of 20 bits (ATen's flash attention): ten
            # times 2 ** -20 of the largest value, which is what went into the sums.
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                ours[name], expected, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )

    return check
