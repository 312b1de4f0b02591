import pytest
import torch

from torchtune_fused.ops import adamw_

SHAPES = [(5, 3), (1,), (17,), (2, 0)]
OPTIONS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}


def parameters(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def state(params, step=0.0):
    """Both moments and the count of steps of each parameter."""
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return *moments, [torch.full((), step) for _ in params]


def joined(lists):
    """Each list's tensors in one: the rule is about the largest of many errors."""
    return [torch.cat([t.detach().flatten() for t in tensors]) for tensors in lists]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change", [{}, {"weight_decay": 0.0}, {"maximize": True}, {"betas": (0.0, 0.999)}], ids=str
)
def test_steps_by_definition(obeys_the_rule, adamw_step, dtype, change):
    options = OPTIONS | change
    params = parameters(dtype)
    plain = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(plain, **options, foreach=False)
    m, v, steps = state(params)
    truths = [(p, a, b) for p, a, b in zip(params, m, v, strict=True)]
    for number in (1, 2, 3):
        grads = parameters(dtype)
        for p, grad in zip(plain, grads, strict=True):
            p.grad = grad
        optimizer.step()
        torch._foreach_add_(steps, 1)
        truths = [
            adamw_step(p, g, a, b, number, **options)
            for (p, a, b), g in zip(truths, grads, strict=True)
        ]
        adamw_(params, grads, m, v, steps, **options)
    assert [int(step) for step in steps] == [3] * len(params)
    states = [optimizer.state[p] for p in plain]
    theirs = plain, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
    obeys_the_rule(*map(joined, ((params, m, v), theirs, zip(*truths, strict=True))))


def test_nothing_to_step_on():
    adamw_([], [], [], [], [], **OPTIONS)


def test_a_backward_pass_notices_that_its_parameter_has_changed():
    params = [torch.randn(3, requires_grad=True)]
    out = (params[0] ** 2).sum()
    adamw_(params, [torch.randn(3)], *state(params, 1.0), **OPTIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("grads", lambda ts: ts[1:], ValueError, "grads must be 4 tensors, got 3"),
        ("grads", lambda ts: [*ts[:3], ts[3].half()], TypeError, r"grads\[3\] must be torch.flo"),
        ("exp_avgs", lambda ts: [ts[0].t(), *ts[1:]], ValueError, r"exp_avgs\[0\] must have shape"),
        (
            "exp_avg_sqs",
            lambda ts: [torch.zeros(3, 5).t(), *ts[1:]],
            ValueError,
            r"exp_avg_sqs\[0\] must be contiguous",
        ),
        ("params", lambda ts: [t.long() for t in ts], TypeError, "params must be of a floating-"),
        ("params", lambda ts: [*ts[:3], ts[3].half()], TypeError, r"params\[3\] must be torch.fl"),
        ("steps", lambda ts: [t.double() for t in ts], TypeError, r"steps\[0\] must be one torch"),
        ("steps", lambda ts: [*ts[:3], ts[3].to("meta")], ValueError, r"steps\[3\] must be on cpu"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(name, change, error, message):
    params = parameters()
    lists = dict(
        zip(
            ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"),
            (params, parameters(), *state(params, 1.0)),
            strict=True,
        )
    )
    before = [p.clone() for p in params]
    with pytest.raises(error, match=message):
        adamw_(**(lists | {name: change(lists[name])}), **OPTIONS)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
