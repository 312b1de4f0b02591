"""Times RMSNorm and the rotation of queries and keys on one GPU, forward and backward.

    python -m torchtune_fused.kernels.benchmark_norm [--cases norm sum rope] [--systems ours]

8192 tokens in bf16, beside torchtune's modules, eager and compiled. Calls run in a captured CUDA
graph over enough distinct inputs that nothing is read twice from L2; a figure is the median of 20
replays, divided by the calls of one. Bytes count every input and output once, and each figure
stands beside a copy that moves as many. The backward pass is that of autograd, but for the case of
that name, which is the norm's alone.
"""

import argparse
from functools import cache

import torch
from torchtune.modules import RMSNorm, RotaryPositionalEmbeddings

from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import captured_microseconds
from torchtune_fused.ops import (
    add_rms_norm,
    kv_cache_update,
    qk_norm_rope,
    qk_norm_rope_append,
    rms_norm,
)

TOKENS, COPIES = 8192, 6
rms_norm_backward = torch.ops.torchtune_fused.rms_norm_backward


def microseconds(run, inputs):
    """Median time of ``run`` on one of the inputs; their outputs do not share memory."""
    return captured_microseconds(lambda: [run(*each) for each in inputs], len(inputs))


def report(case, time, size):
    share = size / time / 1e6 / copy_speed(size)
    print(
        f"{case:44s} {time:8.2f} us {size / time / 1e6:6.3f} TB/s {share:5.0%} of copy", flush=True
    )


def normal(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


@cache
def copy_speed(size):
    """TB/s of a copy that moves as many bytes: the faster of a memcpy and a kernel."""
    pairs = [(normal(size // 4), normal(size // 4)) for _ in range(COPIES)]
    copies = {
        "memcpy": lambda x, y: y.copy_(x),
        "kernel": lambda x, y: torch.neg(x, out=y),
    }
    times = {name: microseconds(run, pairs) for name, run in copies.items()}
    text = ", ".join(f"{name} {time:.2f} us" for name, time in times.items())
    speed = size / min(times.values()) / 1e6
    print(f"a copy that moves {size / 1e6:.1f} MB: {text}, {speed:.3f} TB/s", flush=True)
    return speed


def race(case, systems, chosen, inputs, grads, sizes):
    """Forward and backward of every system, with the bytes that each must move."""
    for who in (who for who in systems if who in chosen):
        forward = systems[who]
        with torch.no_grad():
            report(f"{case}, forward: {who}", microseconds(forward, inputs), sizes[0])

        def step(*tensors, forward=forward):
            outputs = forward(*tensors[: len(inputs[0])])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            leaves = [t for t in tensors[: len(inputs[0])] if t.requires_grad]
            return torch.autograd.grad(outputs, leaves, tensors[len(inputs[0]) :])

        both = [(*i, *g) for i, g in zip(inputs, grads, strict=True)]
        for tensors in inputs:
            for t in tensors:
                t.requires_grad_()
        time = microseconds(step, both)
        for tensors in inputs:
            for t in tensors:
                t.requires_grad_(False)
        report(f"{case}, forward + backward: {who}", time, sum(sizes))


def norm(chosen):
    for dim in (2048, 4096, 64):
        rows = TOKENS * 32 if dim == 64 else TOKENS
        module = RMSNorm(dim, eps=1e-5).cuda().bfloat16()

        def stock(x, weight, module=module):
            return torch.func.functional_call(module, {"scale": weight}, x)

        inputs = [(normal(rows, dim), normal(dim)) for _ in range(COPIES)]
        grads = [(normal(rows, dim),) for _ in range(COPIES)]
        size = inputs[0][0].nbytes
        systems = {
            "ours": lambda x, w: rms_norm(x, w, 1e-5),
            "torchtune compiled": torch.compile(stock, dynamic=False),
            "torchtune": stock,
        }
        race(f"RMSNorm {rows} x {dim}", systems, chosen, inputs, grads, (2 * size, 3 * size))


def backward(chosen):
    if "ours" not in chosen:
        return
    for dim, tokens in ((2048, TOKENS), (4096, TOKENS // 2), (4096, TOKENS)):
        weight, rstd = normal(dim), torch.ones(tokens, device="cuda")
        tensors = [[normal(tokens, dim) for _ in range(3)] for _ in range(COPIES)]
        size = tensors[0][0].nbytes
        for skip in (False, True):
            for trained in (True, False):

                def run(grad, x, grad_skip, args=(weight, rstd), skip=skip, trained=trained):
                    grad_skip = grad_skip if skip else None
                    return rms_norm_backward(grad, x, *args, grad_skip, False, trained)

                case = f"RMSNorm {tokens} x {dim}, backward{', stream' if skip else ''}"
                case += "" if trained else ", frozen"
                report(case, microseconds(run, tensors), (4 if skip else 3) * size)


def of_sum(chosen):
    for dim in (2048, 4096):
        module = RMSNorm(dim, eps=1e-5).cuda().bfloat16()

        def stock(x, residual, weight, module=module):
            total = residual + x
            return torch.func.functional_call(module, {"scale": weight}, total), total

        inputs = [(normal(TOKENS, dim), normal(TOKENS, dim), normal(dim)) for _ in range(COPIES)]
        grads = [(normal(TOKENS, dim), normal(TOKENS, dim)) for _ in range(COPIES)]
        size = inputs[0][0].nbytes
        systems = {
            "ours": lambda x, residual, w: add_rms_norm(x, residual, w, 1e-5),
            "torchtune compiled": torch.compile(stock, dynamic=False),
            "torchtune": stock,
        }
        case = f"RMSNorm of a sum {TOKENS} x {dim}"
        race(case, systems, chosen, inputs, grads, (4 * size, 4 * size))


def rope(chosen):
    for d, normed in ((64, False), (128, False), (128, True)):
        module = RotaryPositionalEmbeddings(d, max_seq_len=TOKENS).cuda()
        cos, sin = module.cache.unbind(-1)

        def stock(q, k, *norms, module=module, d=d):
            q, k = module(q), module(k)
            if norms:
                q, k = (
                    torch.nn.functional.rms_norm(x.float(), (d,), w, 1e-6).to(x.dtype)
                    for x, w in zip((q, k), norms, strict=True)
                )
            return q, k

        def ours(q, k, *norms, cos=cos, sin=sin):
            return qk_norm_rope(q, k, cos, sin, interleaved=True, head_norms=norms or None)

        inputs = []
        for _ in range(COPIES):
            qkv = normal(1, TOKENS, 32 + 2 * 8, d)
            norms = (normal(d), normal(d)) if normed else ()
            inputs.append((qkv[:, :, :32], qkv[:, :, 32:40], *norms))
        grads = [(normal(1, TOKENS, 32, d), normal(1, TOKENS, 8, d)) for _ in range(COPIES)]
        size = TOKENS * 40 * d * 2
        systems = {
            "ours": ours,
            "torchtune compiled": torch.compile(stock, dynamic=False),
            "torchtune": stock,
        }
        case = f"q and k, 32/8, D {d}{', normed' if normed else ''}"
        sizes = (2 * size, (3 if normed else 2) * size)
        race(case, systems, chosen, inputs, grads, sizes)


def prompt(chosen):
    """A prompt on its way into the KV cache, in one pass and in two."""
    start = torch.arange(TOKENS, device="cuda")  # every run begins with an empty cache
    for d in (64, 128):
        cos, sin = RotaryPositionalEmbeddings(d, max_seq_len=TOKENS).cuda().cache.unbind(-1)

        def one(q, k, v, *caches, cos=cos, sin=sin):
            position = start.clone()
            return qk_norm_rope_append(q, k, v, *caches, position, cos, sin, interleaved=True)

        def two(q, k, v, *caches, cos=cos, sin=sin):
            q, k = qk_norm_rope(q, k, cos, sin, interleaved=True)
            kv_cache_update(*caches, start.clone(), k.transpose(1, 2), v.transpose(1, 2))
            return q

        inputs = []
        for _ in range(COPIES):
            heads = normal(1, TOKENS, 32 + 2 * 8, d).split((32, 8, 8), dim=2)
            inputs.append((*heads, normal(1, 8, TOKENS, d), normal(1, 8, TOKENS, d)))
        size = 2 * TOKENS * (32 + 2 * 8) * d * 2
        for name, run in (("one pass", one), ("two", two)) if "ours" in chosen else ():
            with torch.no_grad():
                time = microseconds(run, inputs)
            report(f"q, k and v to the cache, 32/8, D {d}: {name}", time, size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {"norm": norm, "sum": of_sum, "backward": backward, "rope": rope, "cache": prompt}
    systems = ["ours", "torchtune compiled", "torchtune"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    chosen = parser.parse_args()
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    torch.manual_seed(0)
    for case in chosen.cases:
        cases[case](chosen.systems)


if __name__ == "__main__":
    main()
