"""Times a step of AdamW over the weights of a model in bf16, on one GPU.

    python -m torchtune_fused.kernels.benchmark_optimizer [--layers 16]

The tensors are those of Llama-3.2-1B. Beside ours: torch's fused AdamW and, compiled, its `foreach`
one. A figure is the median of 20 turns of four steps, whose launches are ahead of the GPU as they
are in training. The floor is a copy of as many bytes: a step reads a weight, its gradient and two
moments, and writes all but the gradient.
"""

import argparse
import random
from statistics import median

import torch
from torch import nn

from torchtune_fused import AdamW
from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import in_turns

TURNS, CALLS = 20, 4
DIM, KV_DIM, HIDDEN, VOCAB = 2048, 512, 8192, 128256
LAYER = [(DIM, DIM), (KV_DIM, DIM), (KV_DIM, DIM), (DIM, DIM), (DIM,), (DIM,)]
LAYER += [(HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN)]


def weights(layers):
    """Parameters with gradients."""
    shapes = [(VOCAB, DIM), *LAYER * layers, (DIM,)]
    params = [nn.Parameter(torch.randn(s, device="cuda").mul_(0.02).bfloat16()) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def contenders(params):
    """A step of each optimizer. All go on with the same weights."""
    lr = torch.tensor(1e-5, device="cuda")  # a number would be compiled in
    foreach = torch.optim.AdamW(params, lr=lr, foreach=True, capturable=True)
    return {
        "ours": AdamW(params, lr=1e-5).step,
        "torch fused": torch.optim.AdamW(params, lr=1e-5, fused=True).step,
        "torch compiled": torch.compile(foreach.step),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    random.seed(0)
    torch.manual_seed(0)
    params = weights(arguments.layers)
    size = sum(param.numel() for param in params)
    moved = 7 * size * params[0].element_size()
    source, target = (torch.empty(moved // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    steps = {"copy": lambda: target.copy_(source), **contenders(params)}
    times = in_turns(steps, TURNS, CALLS)
    print(f"{len(params)} tensors, {size / 1e9:.3f}e9 weights, {moved / 1e9:.2f} GB")
    for name, found in times.items():
        print(f"  {name:14s} {median(found):7.3f} ms  {moved / median(found) / 1e9:.2f} TB/s")


if __name__ == "__main__":
    main()
