"""Our AdamW beside torch's, on the CPU, where both have the same arithmetic."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune import training
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from torchtune_fused import AdamW


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 3)).to(dtype)


def stock(params, *args, **options):
    return torch.optim.AdamW(params, *args, fused=True, **options)


def backward(model, number):
    torch.manual_seed(number)
    dtype = next(model.parameters()).dtype
    loss = model(torch.randn(4, 7, dtype=dtype)).square().sum()
    loss.backward()
    return loss


def train(model, optimizer, numbers, scheduler=None):
    for number in numbers:
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return list(model.parameters())


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


class SeenOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_groups_schedules_and_parameters_without_a_gradient(dtype):
    trained = []
    for optimizer in (AdamW, stock):
        model = build(dtype)
        model[1].requires_grad_(False)
        groups = [
            {"params": [*model[0].parameters()], "lr": 0.1, "weight_decay": 0.0},
            {"params": [*model[1].parameters()]},  # has none
            {"params": [*model[2].parameters()], "betas": (0.5, 0.6), "maximize": True},
        ]
        used = optimizer(groups, 1e-2, weight_decay=0.5)
        scheduler = get_cosine_schedule_with_warmup(used, 2, num_training_steps=9)
        trained.append(train(model, used, range(5), scheduler))
    assert_same(*trained)
    assert_same(trained[0][2:4], list(build(dtype)[1].parameters()))


def test_parameters_of_several_dtypes():
    trained = []
    for optimizer in (AdamW, stock):
        torch.manual_seed(0)
        dtypes = (torch.float32, torch.bfloat16) * 2
        params = [nn.Parameter(torch.randn(5, dtype=dtype)) for dtype in dtypes]
        used = optimizer(params, lr=0.1)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn_like(param)
            used.step()
        trained.append(params)
    assert_same(*trained)


def test_one_op_for_a_group():
    model = build()
    optimizer = AdamW(model.parameters())
    backward(model, 0)
    with SeenOps() as seen:
        optimizer.step()
    assert seen.names.count("torchtune_fused::adamw_") == 1


HALVES = torch.tensor(0.5), torch.tensor(0.5)


@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True}, {"lr": torch.tensor(0.01)}, {"betas": HALVES}],
    ids=lambda options: next(iter(options)),
)
def test_what_is_left_to_torch(options):
    trained = []
    for optimizer in (AdamW, stock):
        model = build()
        used = optimizer(model.parameters(), **options)
        with SeenOps() as seen:
            trained.append(train(model, used, range(3)))
        assert "torchtune_fused::adamw_" not in seen.names
    assert_same(*trained)


def test_parameters_that_are_not_contiguous_are_left_to_torch():
    trained = []
    for optimizer in (AdamW, stock):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(4, 3).t())
        used = optimizer([param], lr=0.1)
        for _ in range(2):
            param.grad = torch.randn(4, 3).t()
            used.step()
        trained.append([param])
    assert_same(*trained)


def test_scaled_gradients_are_left_to_torch():
    trained = []
    for optimizer in (AdamW, stock):
        model = build()
        used = optimizer(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for number in range(4):
            torch.manual_seed(number)
            loss = model(torch.randn(4, 7)).square().sum()
            scaler.scale(loss * (torch.inf if number == 2 else 1)).backward()
            scaler.step(used)
            scaler.update()
            used.zero_grad()
        assert [int(state["step"]) for state in used.state.values()] == [3] * 6
        trained.append(list(model.parameters()))
    assert_same(*trained)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("ours_first", [True, False])
def test_either_goes_on_where_the_other_was(options, ours_first):
    def theirs(params):
        return torch.optim.AdamW(params, lr=0.1, **options)

    def ours(params):
        return AdamW(params, lr=0.1)

    first, second = (ours, theirs) if ours_first else (theirs, ours)
    whole, model = build(), build()
    optimizer = theirs(whole.parameters())
    expected = train(whole, optimizer, range(6))
    before, after = first(model.parameters()), second(model.parameters())
    train(model, before, range(3))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    found = train(model, after, range(3, 6))
    for a, b in zip(found, expected, strict=True):
        # torch's own ways of computing AdamW round in other places.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    state, wanted = (o.state_dict()["state"] for o in (after, optimizer))
    assert [s["step"].item() for s in state.values()] == [s["step"] for s in wanted.values()]
    with SeenOps() as seen:
        train(model, after, [6])
    assert ("torchtune_fused::adamw_" in seen.names) == isinstance(after, AdamW)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alone(again):
    model = build()
    optimizer = AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    other, copied = again((model, optimizer))
    assert_same(train(model, optimizer, [2]), train(other, copied, [2]))
    assert type(copied) is AdamW


def test_hooks_and_closures_run_once():
    seen = []
    stock(build().parameters())  # gives torch's own class its hooks
    model = build()
    optimizer = AdamW(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("closure")
        return backward(model, 0)

    assert optimizer.step(closure).requires_grad
    assert seen == ["before", "closure", "after"]


def test_in_the_backward_pass():
    whole, model = build(), build()
    optimizers = {p: AdamW([p], lr=0.1) for p in model.parameters()}
    training.register_optim_in_bwd_hooks(model, optimizers)
    for number in range(3):
        backward(model, number)
    assert all(p.grad is None for p in model.parameters())
    assert_same(model.parameters(), train(whole, stock(whole.parameters(), lr=0.1), range(3)))


def test_compiled():
    whole, model = build(), build()
    optimizer = AdamW(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for number in range(3):
        backward(model, number)
        step()
        optimizer.zero_grad()
    assert_same(model.parameters(), train(whole, AdamW(whole.parameters(), lr=0.1), range(3)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fused": False}, ValueError, "is always fused: use torch.optim.AdamW"),
        ({"foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ],
    ids=str,
)
def test_what_it_is_not(options, error, message):
    with pytest.raises(error, match=message):
        AdamW(build().parameters(), **options)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_stepped_on_where_they_are(alone):
    whole, model = build(), build()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    optimizer = AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    resumed = AdamW(model.parameters(), lr=0.5)
    set_optimizer_state_dict(model, resumed, state, options=StateDictOptions(full_state_dict=True))
    with SeenOps() as seen:
        found = [p.full_tensor() for p in train(model, resumed, range(2, 4))]
    assert "torchtune_fused::adamw_" in seen.names
    assert not any("fused_adamw" in name for name in seen.names)
    assert_same(found, train(whole, stock(whole.parameters(), lr=0.1), range(4)))
