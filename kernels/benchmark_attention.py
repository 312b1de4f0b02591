"""Times attention of many queries on one GPU, beside PyTorch's.

    python -m torchtune_fused.kernels.benchmark_attention [--cases causal full packed dense mask]

Tensors are as projections give them, [b, s, h, d] in memory, of random bf16. A figure is the median
of 20 runs, those of all contenders taken in turn, each queued behind a pause so that the GPU never
waits for Python, as in training; arithmetic counts what the mask leaves: 4 flops forward and 10
backward for each visible pair of tokens and channel. Packed documents are timed with the making of
the mask, from torchtune's document ids on, and so are the dense masks. FlexAttention is compiled;
its mask is made as torchtune makes it, uncompiled, and by a compiled create_block_mask.
"""

import argparse
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import milliseconds
from torchtune_fused.ops import attention, document_bounds, mask_tiles

RUNS = 20
PAUSE = 20_000_000  # cycles, longer than it takes to queue any contender
SHAPES = [  # b, h, h_kv, s, d
    (1, 32, 8, 8192, 128),
    (4, 32, 8, 4096, 128),
    (16, 32, 8, 1024, 128),
    (4, 32, 8, 4096, 64),
    (1, 16, 16, 16384, 128),
    (4, 32, 32, 4096, 80),
    (4, 32, 32, 4096, 96),
    (4, 16, 8, 4096, 256),
]


def tokens(b, heads, s, d):
    return torch.randn(b, s, heads, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)


def in_turns(contenders):
    """Median time of each function by name; those that fail are left out."""
    times = {}
    for name, run in contenders.items():
        try:
            for _ in range(3):
                run()
            times[name] = []
        except RuntimeError as error:
            print(f"    {name} does not run: {str(error).splitlines()[0][:80]}")
    for _ in range(RUNS):
        for name, measured in times.items():
            torch.cuda._sleep(PAUSE)
            measured.append(milliseconds(contenders[name]))
    return {name: median(measured) for name, measured in times.items()}


def report(case, contenders, flops=None):
    times = in_turns(contenders)
    text = []
    for name, time in times.items():
        speed = "" if flops is None else f" = {flops / time / 1e9:.0f} TFLOP/s"
        text.append(f"{name} {time:.3f} ms{speed}")
    print(f"{case:42s} {'; '.join(text)}", flush=True)


def backward_of(out, leaves, grad):
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def own_backward(q, k, v, grad, causal):
    """Our kernel, also where `attention` leaves the gradients to cuDNN."""
    scale = q.shape[-1] ** -0.5
    op = torch.ops.torchtune_fused
    hidden = None, None, None, causal, scale, None, None
    out, lse = op.attention(q, k, v, *hidden)
    return lambda: op.attention_backward(
        grad, q, k, v, out, lse, *hidden, False, None, None, None, False
    )


def shapes(causal):
    for b, heads, kv_heads, s, d in SHAPES:
        q, k, v = (tokens(b, h, s, d) for h in (heads, kv_heads, kv_heads))
        leaves, grad = [t.requires_grad_() for t in (q, k, v)], tokens(b, heads, s, d)
        flops = 4 * b * heads * s * s * d / (2 if causal else 1)
        forward = {"ours": lambda q=q, k=k, v=v: attention(q, k, v, causal=causal)}
        for name, backend in (
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):

            def sdpa(q=q, k=k, v=v, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=True
                    )

            forward[name] = sdpa
        case = f"{'causal' if causal else 'full'} {b} x {s}, {heads}/{kv_heads} heads, D {d}"
        with torch.no_grad():
            report(f"forward {case}", forward, flops)
        backward = {name: backward_of(run(), leaves, grad) for name, run in forward.items()}
        with torch.no_grad():
            backward["our kernel"] = own_backward(q, k, v, grad, causal)
        report(f"backward {case}", backward, 2.5 * flops)
        del forward, backward, leaves, q, k, v, grad
        torch.cuda.empty_cache()


def packed_rule(ids):
    def rule(b, h, q, kv):
        return (q >= kv) & (ids[b, q] == ids[b, kv])

    return rule


def packed():
    eight = torch.full((8,), 1024)
    random = torch.randint(1, 16384, (63,), generator=torch.Generator().manual_seed(0))
    many = torch.tensor([0, *random.sort().values.tolist(), 16384]).diff()
    flex = torch.compile(flex_attention, dynamic=False)
    compiled_mask = torch.compile(create_block_mask, dynamic=False)
    for name, lengths in [("8 x 1024", eight), ("64 documents in 16384", many)]:
        report(*documents(name, lengths, flex, compiled_mask))


def documents(name, lengths, flex, compiled_mask):
    """The case of one row of packed documents: its name, contenders, and flops."""
    s, d = int(lengths.sum()), 128
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None].cuda()
    q, k, v = leaves = [tokens(1, h, s, d).requires_grad_() for h in (32, 8, 8)]
    grad = tokens(1, 32, s, d)

    def ours():
        out = attention(q, k, v, causal=True, documents=document_bounds(ids))
        return torch.autograd.grad(out, leaves, grad)

    def theirs(mask):
        out = flex(q, k, v, block_mask=mask, enable_gqa=True)
        return torch.autograd.grad(out, leaves, grad)

    def mask(make):
        return make(packed_rule(ids), 1, None, s, s)

    made = mask(compiled_mask)
    contenders = {
        "ours": ours,
        "flex, torchtune's mask": lambda: theirs(mask(create_block_mask)),
        "flex, compiled mask": lambda: theirs(mask(compiled_mask)),
        "flex, mask for free": lambda: theirs(made),
    }
    pairs = (lengths * (lengths + 1) // 2).sum().item()
    return f"packed {name}, D {d}, forward + backward", contenders, 14 * 32 * pairs * d


def dense():
    b, s = 4, 4096
    mask = torch.ones(1, s, s, dtype=torch.bool, device="cuda").tril()
    q, k, v = leaves = [tokens(b, h, s, 128).requires_grad_() for h in (32, 8, 8)]
    grad, flops = tokens(b, 32, s, 128), 2 * b * 32 * s * s * 128
    tiles = mask_tiles(mask)
    with torch.no_grad():
        forward = {
            "causal flag": lambda: attention(q, k, v, causal=True),
            "mask, made": lambda: attention(q, k, v, tiles),
            "mask, with making": lambda: attention(q, k, v, mask),
        }
        report("forward, dense mask that is causal", forward, flops)
        own = {"causal flag": own_backward(q, k, v, grad, True)}
    own["mask, made"] = backward_of(attention(q, k, v, tiles), leaves, grad)
    report("backward of our kernel, the same", own, 2.5 * flops)


def mask():
    for shape in [(1, 4096, 4096), (8, 4096, 4096), (1, 16384, 16384)]:
        masks = [torch.rand(shape, device="cuda") < 0.5 for _ in range(4)]
        run = {"mask_tiles": lambda masks=masks: [mask_tiles(m) for m in masks]}
        time = in_turns(run)["mask_tiles"] / len(masks)
        size = masks[0].nbytes * 9 / 8
        print(f"mask_tiles {list(shape)}: {time * 1e3:.1f} us, {size / time / 1e9:.2f} TB/s")


CASES = {
    "causal": lambda: shapes(True),
    "full": lambda: shapes(False),
    "packed": packed,
    "dense": dense,
    "mask": mask,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args().cases
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    torch.manual_seed(0)
    for case in chosen:
        CASES[case]()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
