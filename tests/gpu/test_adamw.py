"""AdamW's kernel against fp64 and torch's fused one, and the optimizer made of it."""

import copy

import pytest
import torch
from torch import nn

from torchtune_fused import AdamW
from torchtune_fused.ops import adamw_

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
# One element; below, at and above what a thread, a block and several take at once.
SIZES = [1, 7, 8, 9, 1021, 4096, 4097, 65537, 1 << 20]


def tensors(sizes, dtype, offset=0):
    """Random ones, each ``offset`` elements into a storage of its own."""
    return [torch.randn(n + offset, device="cuda").to(dtype)[offset:] for n in sizes]


def state(sizes, dtype, offset=0):
    """Parameters and moments of training that is under way."""
    second = [v.square_() for v in tensors(sizes, dtype, offset)]
    return tensors(sizes, dtype, offset), tensors(sizes, dtype, offset), second


def counts(numbers):
    return [torch.tensor(float(number), device="cuda") for number in numbers]


def cloned(lists):
    return [[t.clone() for t in tensors] for tensors in lists]


def torch_step(params, grads, m, v, steps, *, betas, maximize=False, **options):
    beta1, beta2 = betas
    options |= {"beta1": beta1, "beta2": beta2, "maximize": maximize, "amsgrad": False}
    torch._fused_adamw_(params, grads, m, v, [], steps, **options)


def joined(lists):
    return [torch.cat([t.flatten() for t in tensors]) for tensors in lists]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "change",
    [{}, {"weight_decay": 0.0}, {"maximize": True}, {"betas": (0.0, 0.95)}, {"eps": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize("before", [0, 1, 30, 100_000])
def test_steps_are_as_exact_as_torchs(assert_as_exact, adamw_step, dtype, change, before):
    options = OPTIONS | change
    ours = state(SIZES, dtype)
    if before == 0:  # as adapters and moments are at first
        ours = [[torch.zeros_like(t) for t in ts] for ts in ours]
    theirs, truth = cloned(ours), [[t.double() for t in ts] for ts in ours]
    for number in range(before + 1, before + 5):
        grads, steps = tensors(SIZES, dtype), counts([number] * len(SIZES))
        adamw_(ours[0], grads, *ours[1:], steps, **options)
        torch_step(theirs[0], grads, *theirs[1:], steps, **options)
        stepped = [
            adamw_step(p, g.double(), m, v, number, **options)
            for p, g, m, v in zip(truth[0], grads, *truth[1:], strict=True)
        ]
        truth = list(zip(*stepped, strict=True))
        assert all(int(step) == number for step in steps)
    for mine, plain, exact in zip(*map(joined, (ours, theirs, truth)), strict=True):
        assert_as_exact(mine, plain, exact, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", range(4))
def test_any_address_gives_the_same_result(dtype, place):
    lists = [*state(SIZES, dtype), tensors(SIZES, dtype)]
    moved = cloned(lists)
    # One element away from a multiple of 16 bytes.
    moved[place] = [torch.cat([t[:1], t])[1:] for t in moved[place]]
    for params, m, v, grads in (lists, moved):
        adamw_(params, grads, m, v, counts(range(1, len(SIZES) + 1)), **OPTIONS)
    for one, other in zip(lists, moved, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_more_tensors_than_a_launch_takes():
    sizes = [(37 * i) % 5000 for i in range(301)]  # some are empty
    together = [*state(sizes, torch.bfloat16), tensors(sizes, torch.bfloat16)]
    alone, steps = cloned(together), counts(range(1, len(sizes) + 1))
    for params, m, v, grads in (together, *([[t] for t in ts] for ts in zip(*alone, strict=True))):
        own = steps if len(params) > 1 else [steps.pop(0)]
        adamw_(params, grads, m, v, list(own), **OPTIONS)
    for one, other in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 20e9, reason="needs 20 GB"
)
def test_a_tensor_of_more_than_two_billion_elements():
    n = 2**31 + 4099
    param, grad, m, v = (torch.zeros(n, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    ends = [slice(5000), slice(2**31 - 2500, 2**31 + 2500), slice(n - 3000, n)]
    for end in ends:
        param[end].normal_()
        grad[end].normal_()
    parts = [[t[end].clone() for t in (param, grad, m, v)] for end in ends]
    adamw_([param], [grad], [m], [v], counts([1]), **OPTIONS)
    for end, part in zip(ends, parts, strict=True):
        adamw_(*([t] for t in part), counts([1]), **OPTIONS)
        assert all(torch.equal(t[end], o) for t, o in zip((param, grad, m, v), part, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_spreads_as_in_torch(dtype):
    large, tiny = torch.finfo(dtype).max / 2, torch.finfo(dtype).tiny
    special = [torch.nan, torch.inf, -torch.inf, large, -large, 1e19, tiny, 0.0, 1.0]
    values = torch.tensor(special, dtype=torch.float64, device="cuda").to(dtype)
    # Each as a gradient, for each as a first and as a second moment.
    grads, m, v = (t.flatten() for t in torch.meshgrid(values, values, values.abs(), indexing="ij"))
    ours = [torch.ones_like(grads), m.clone(), v.clone()]
    theirs = [t.clone() for t in ours]
    steps, options = counts([3]), OPTIONS | {"betas": (0.9, 0.99)}
    for step, (param, *moments) in ((adamw_, ours), (torch_step, theirs)):
        step([param], [grads], *([t] for t in moments), steps, **options)
    for mine, plain in zip(ours, theirs, strict=True):
        # Versions of torch differ in what becomes inf and what NaN.
        kept = plain.isfinite()
        torch.testing.assert_close(mine[kept], plain[kept])
        assert mine[grads.isnan()].isnan().all()
        assert not mine[grads.isinf()].isfinite().any()


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda ts: ts[1:], "must be 3 as params are, got 2, 3, 3 and 3"),
        (1, lambda ts: [*ts[:2], ts[2].float()], r"grads\[2\] must be BFloat16, got Float"),
        (2, lambda ts: [ts[0][None], *ts[1:]], r"exp_avgs\[0\] must have shape \[7\] as its par"),
        (3, lambda ts: [torch.cat([t, t])[::2] for t in ts], r"exp_avg_sqs\[0\] must be contig"),
        (0, lambda ts: [t.long() for t in ts], r"params\[0\] must be a floating-point tensor"),
        (0, lambda ts: [t.cpu() for t in ts], r"params\[0\] must be on a CUDA device"),
        (4, lambda ts: [*ts[:2], ts[2].cpu()], r"steps\[2\] must be on cuda:0, got another"),
        (4, lambda ts: [t.double() for t in ts], r"steps\[0\] must be Float, got Double"),
        (4, lambda ts: [t.expand(2) for t in ts], r"steps\[0\] must have one element, got \[2\]"),
    ],
)
def test_what_does_not_fit_is_an_error_and_changes_nothing(place, change, message):
    sizes = [7, 8, 9]
    params, m, v = state(sizes, torch.bfloat16)
    lists = [params, tensors(sizes, torch.bfloat16), m, v, counts([1] * 3)]
    before = cloned(lists)
    wrong = [change(ts) if i == place else ts for i, ts in enumerate(lists)]
    with pytest.raises(RuntimeError, match=message):
        adamw_(*wrong, **OPTIONS)
    for now, then in zip(lists, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def model():
    torch.manual_seed(0)
    layers = nn.Linear(67, 129), nn.Linear(129, 64), nn.Linear(64, 5, bias=False)
    return nn.Sequential(*layers).to("cuda", torch.bfloat16)


def train(trained, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        trained(torch.randn(9, 67, device="cuda").bfloat16()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_either_goes_on_where_the_other_was(ours_first, options):
    whole, trained = model(), model()
    expected = train(whole, torch.optim.AdamW(whole.parameters(), lr=1e-2, **options), range(6))
    kinds = [AdamW, lambda *args, **kwargs: torch.optim.AdamW(*args, **kwargs, **options)]
    first, second = (
        kind(trained.parameters(), lr=1e-2) for kind in (kinds if ours_first else kinds[::-1])
    )
    train(trained, first, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found = train(trained, second, range(3, 6))
    # Weights move by up to lr a step, and where a gradient is near 0 its sign is of rounding.
    assert (found - expected).abs().float().mean() < 1e-3
    assert [int(s["step"]) for s in second.state_dict()["state"].values()] == [6] * 5


def test_a_captured_step_is_that_of_its_number():
    eager, captured = model(), model()
    grads = [torch.randn_like(p) for p in eager.parameters()]
    optimizers = []
    for each in (eager, captured):
        optimizers.append(AdamW(each.parameters(), lr=1e-2))
        for param, grad in zip(each.parameters(), grads, strict=True):
            param.grad = grad.clone()
        optimizers[-1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for _ in range(3):
        optimizers[0].step()
        graph.replay()
    for a, b in zip(eager.parameters(), captured.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"amsgrad": True}, "amsgrad is set"),
        ({"lr": torch.tensor(1e-2)}, "the learning rate or a beta is a tensor"),
    ],
    ids=["amsgrad", "lr"],
)
def test_what_is_left_to_torch_is_said(options, reason):
    ours, theirs = model(), model()
    with pytest.warns(UserWarning, match=f"AdamW steps with torch's kernel, as {reason}"):
        found = train(ours, AdamW(ours.parameters(), **options), range(2))
    optimizer = torch.optim.AdamW(theirs.parameters(), fused=True, **options)
    assert torch.equal(found, train(theirs, optimizer, range(2)))
