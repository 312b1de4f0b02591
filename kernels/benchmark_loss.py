"""Times linear + cross-entropy, forward and backward, on one GPU.

    python -m torchtune_fused.kernels.benchmark_loss [--tokens 8192] [--dim 4096] [--vocab 128256]

Beside ours: torchtune's chunked loss as its recipes run it (logits in chunks, the loss of a chunk
compiled) and Liger's fused one, if installed, with a trained and with a frozen head. As in these
recipes, the backward pass starts from the mean times the number of tokens. "extra" is the peak of
memory above hidden states, weight and targets, gradients included. A figure is the median of 20
runs, which take turns. The floor is the three (frozen: two) matrix products.
"""

import argparse
from statistics import median

import torch
from torchtune.modules.loss import CEWithChunkedOutputLoss

from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import milliseconds
from torchtune_fused.ops import linear_cross_entropy

RUNS = 20


def contenders(targets):
    """Each loss as a function of the hidden states ``[1, tokens, dim]`` and the weight."""
    chunked = CEWithChunkedOutputLoss()
    chunked.compute_cross_entropy = torch.compile(chunked.compute_cross_entropy)

    def torchtune(hidden, weight):
        logits = [chunk @ weight.t() for chunk in hidden.chunk(chunked.num_output_chunks, dim=1)]
        return chunked(logits, targets)

    def by_token(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, reduction="none").mean()

    found = {
        "ours": lambda h, w: linear_cross_entropy(h, w, targets),
        "ours, token by token": by_token,
        "torchtune, compiled": torchtune,
    }
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        print(f"without Liger: {error}")
    else:
        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda h, w: liger(w, h[0], targets[0])
    return found


def step(loss, hidden, weight):
    """One forward and backward pass: its milliseconds, its peak of memory, and the loss."""
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    def run():
        nonlocal value
        value = loss(hidden, weight)
        (value * hidden.shape[1]).backward()

    value = None
    time = milliseconds(run)
    extra = torch.cuda.max_memory_allocated() - before
    return time, extra / 1e9, value.item()


def product_speed(dim):
    """TFLOP/s of a product of bf16 matrices of this size, as the ceiling."""
    a, b = (torch.randn(2 * dim, 2 * dim, device="cuda").bfloat16() for _ in range(2))
    time = median(milliseconds(lambda: a @ b) for _ in range(RUNS))
    return 2 * (2 * dim) ** 3 / time / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    arguments = parser.parse_args()
    tokens, dim, vocab = arguments.tokens, arguments.dim, arguments.vocab
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    torch.manual_seed(0)
    hidden = torch.randn(1, tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocab, dim, device="cuda").mul_(dim**-0.5).bfloat16()
    targets = torch.randint(vocab, (1, tokens), device="cuda")
    losses = contenders(targets)
    speed = product_speed(dim)
    print(f"{tokens} tokens, dim {dim}, vocabulary {vocab}; a product runs at {speed:.0f} TFLOP/s")
    for frozen in (False, True):
        weight.requires_grad_(not frozen)
        results = {name: [] for name in losses}
        for run in range(RUNS + 3):
            for name, loss in losses.items():
                result = step(loss, hidden, weight)
                if run >= 3:
                    results[name].append(result)
        floor = (2 if frozen else 3) * 2 * tokens * dim * vocab / speed / 1e9
        print(f"head {'frozen' if frozen else 'trained'}, floor {floor:.1f} ms")
        for name, runs in results.items():
            times, extras, values = zip(*runs, strict=True)
            cost = f"{median(times):6.1f} ms  extra {max(extras):5.2f} GB"
            print(f"  {name:22s} {cost}  loss {values[-1]:.5f}")


if __name__ == "__main__":
    main()
