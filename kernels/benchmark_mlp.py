"""Times the gated MLP and LoRA layers on one GPU, beside torch.compile and Liger.

    python -m torchtune_fused.kernels.benchmark_mlp [--cases activation products weights 1B 8B lora]

Elementwise kernels against the bandwidth of a copy; matrix products with the activation inside
against cuBLAS and the elementwise kernels; gradients of the weights of queries, keys and values
against cuBLAS; the MLPs of Llama-3.2-1B and Llama-3.1-8B on 8192 tokens, forward and backward,
against torchtune's FeedForward under torch.compile and Liger's SwiGLU (where liger_kernel is
installed); 8B's projections with LoRA of rank 16 on 4096 tokens. All in bf16 with random data. The
contenders take turns of four calls, long enough to hide the launches, or of forty, long enough for
the GPU to reach its power limit, each turn in a new random order, as who comes before sets the
clock that one starts at. A figure is the median of 24 turns, a ratio that of the ratios in a turn.
"""

import argparse
import copy
import random
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward
from torchtune.modules.peft import LoRALinear

from torchtune_fused import patch_model
from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import in_turns
from torchtune_fused.modules import FusedFeedForward
from torchtune_fused.ops.gated_activation import gated_activation, gated_activation_backward

TURNS, CALLS = 24, 4
SIZES = {"1B": (2048, 8192), "8B": (4096, 14336)}  # dim, hidden
KV_DIMS = {"1B": 512, "8B": 1024}


def microseconds(contenders: dict[str, Callable], calls: int = CALLS) -> dict[str, float]:
    """The median time of each."""
    times = in_turns(contenders, TURNS, calls)
    return {name: median(turns) * 1e3 for name, turns in times.items()}


def report(case: str, time: float, what: str) -> None:
    print(f"{case:52s} {time:9.1f} us  {what}", flush=True)


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()


def activation() -> None:
    for size, (_, hidden) in SIZES.items():
        gate, up, grad = (normal(8192, hidden) for _ in range(3))
        out = torch.empty_like(gate)
        moved = {
            "copy": (2, lambda o=out, g=gate: o.copy_(g)),
            "forward": (3, lambda g=gate, u=up: gated_activation(g, u, "silu")),
            "backward": (
                6,
                lambda d=grad, g=gate, u=up: gated_activation_backward(
                    d, g, u, "silu", need_hidden=True
                ),
            ),
        }
        times = microseconds({name: run for name, (_, run) in moved.items()})
        for name, (tensors, _) in moved.items():
            speed = tensors * gate.nbytes / times[name] / 1e6
            report(f"{size} SiLU times up, 8192 tokens: {name}", times[name], f"{speed:.2f} TB/s")


def products(size: str) -> None:
    ops = torch.ops.torchtune_fused
    dim, hidden = SIZES[size]
    x, grad, gate, up = (normal(8192, n) for n in (dim, dim, hidden, hidden))
    w_gate, w_up, w_down = (normal(*s) / 64 for s in ((hidden, dim),) * 2 + ((dim, hidden),))
    apart = {
        "gate, up and activation: cuBLAS and ours": lambda: gated_activation(
            x @ w_gate.t(), x @ w_up.t(), "silu"
        ),
        "gradients of both: cuBLAS and ours": lambda: gated_activation_backward(
            grad @ w_down, gate, up, "silu", need_hidden=True
        ),
    }
    no_low = (None, None, None)
    fused = {
        "gate, up and activation: one kernel": lambda: ops.gated_linear(
            x, w_gate, w_up, *no_low, "silu", False
        ),
        "the same, gate and up kept": lambda: ops.gated_linear(
            x, w_gate, w_up, *no_low, "silu", True
        ),
        "gradients of both: one kernel": lambda: ops.gated_linear_backward(
            grad, w_down, gate, up, None, None, "silu", True
        ),
    }
    if not ops.gated_linear_takes(x, w_gate, w_up, []):
        fused = {}  # the kernels are Hopper's
    for name, time in microseconds(apart | fused).items():
        report(f"{size} {name}", time, "")


def weights(size: str) -> None:
    ops = torch.ops.torchtune_fused
    dim, kv_dim = SIZES[size][0], KV_DIMS[size]
    x, grads = normal(8192, dim), [normal(8192, n) for n in (dim, kv_dim, kv_dim)]
    contenders = {"cuBLAS": lambda: [grad.t() @ x for grad in grads]}
    if ops.grouped_weight_gradients_takes(grads, x):
        contenders["one kernel"] = lambda: ops.grouped_weight_gradients(grads, x)
    for name, time in microseconds(contenders, calls=40).items():
        report(f"{size} gradients of the weights of q, k, v: {name}", time, "")


def step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None
    module(x).backward(grad)


def liger(dim: int, hidden: int, stock: FeedForward) -> nn.Module | None:
    try:
        from liger_kernel.transformers.swiglu import LigerSwiGLUMLP
    except ImportError:
        return None
    config = SimpleNamespace(hidden_size=dim, intermediate_size=hidden, hidden_act="silu")
    module = LigerSwiGLUMLP(config).to("cuda", torch.bfloat16)
    module.gate_proj, module.up_proj, module.down_proj = stock.w1, stock.w3, stock.w2
    return module


def compare(case: str, tokens: int, modules: dict[str, nn.Module], flops: tuple[float, float]):
    """Forward without gradients, and forward with backward, of modules that share one shape."""
    dim = next(p for p in modules["ours"].parameters() if p.ndim == 2).shape[1]
    x, grad = normal(1, tokens, dim).requires_grad_(), normal(1, tokens, dim)
    rounds = {
        "forward": ({n: lambda m=m: m(x) for n, m in modules.items()}, torch.no_grad()),
        "forward + backward": (
            {n: lambda m=m: step(m, x, grad) for n, m in modules.items()},
            torch.enable_grad(),
        ),
    }
    for (what, (contenders, mode)), work in zip(rounds.items(), flops, strict=True):
        with mode:
            times = in_turns(contenders, TURNS, CALLS)
        for name, turns in times.items():
            modules[name].zero_grad(set_to_none=True)
            time = median(turns) * 1e3
            ratio = median(its / ours for its, ours in zip(turns, times["ours"], strict=True))
            report(
                f"{case} {what}: {name}", time, f"{work / time / 1e6:5.0f} TFLOP/s  {ratio:.3f}x"
            )
    for name, module in modules.items():
        module.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = module(x)
        kept = torch.cuda.memory_allocated() - before
        out.backward(grad)
        peak = torch.cuda.max_memory_allocated() - before
        print(f"{case} memory: {name}: {kept / 2**20:.0f} MiB kept, {peak / 2**20:.0f} at most")


def feed_forward(dim: int, hidden: int, linear: Callable[[int, int], nn.Module]) -> FeedForward:
    return FeedForward(
        gate_proj=linear(dim, hidden), up_proj=linear(dim, hidden), down_proj=linear(hidden, dim)
    ).to("cuda", torch.bfloat16)


def mlp(size: str) -> None:
    dim, hidden = SIZES[size]
    stock = feed_forward(dim, hidden, lambda i, o: nn.Linear(i, o, bias=False))
    modules = {
        "ours": FusedFeedForward.from_stock(copy.deepcopy(stock)),
        "torchtune": stock,
        "torchtune compiled": torch.compile(copy.deepcopy(stock)),
        "Liger": liger(dim, hidden, stock),
    }
    work = 3 * 2 * 8192 * dim * hidden
    modules = {name: module for name, module in modules.items() if module is not None}
    compare(f"{size} MLP, 8192 tokens,", 8192, modules, (work, 3 * work))


def frozen(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora" in name)
    return module


def lora() -> None:
    dim, hidden = SIZES["8B"]

    def adapted(i: int, o: int) -> LoRALinear:
        return LoRALinear(i, o, rank=16, alpha=32)

    for case, stock, weights in (
        ("LoRA 4096 x 4096", adapted(dim, dim).to("cuda", torch.bfloat16), dim * dim),
        ("LoRA MLP of 8B", feed_forward(dim, hidden, adapted), 3 * dim * hidden),
    ):
        ours = nn.Sequential(copy.deepcopy(stock))
        patch_model(ours)
        modules = {
            "ours": frozen(ours),
            "torchtune": frozen(stock),
            "torchtune compiled": torch.compile(frozen(copy.deepcopy(stock))),
        }
        work = 2 * 4096 * weights
        compare(f"{case}, 4096 tokens,", 4096, modules, (work, 2 * work))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {
        "activation": activation,
        "products": lambda: [products(size) for size in SIZES],
        "weights": lambda: [weights(size) for size in SIZES],
        "1B": lambda: mlp("1B"),
        "8B": lambda: mlp("8B"),
        "lora": lora,
    }
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    chosen = parser.parse_args().cases
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    for name in chosen:
        random.seed(0)
        torch.manual_seed(0)
        cases[name]()


if __name__ == "__main__":
    main()
