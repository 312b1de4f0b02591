"""Times the decode kernels on one GPU.

    python -m torchtune_fused.kernels.benchmark_decode [--cases ceilings sampling attention 1B 8B]

Whole steps of Llama-3.2-1B and Llama-3.1-8B with random weights, their linears one by one,
attention against PyTorch's cuDNN, and sampling. Everything runs in a captured CUDA graph over the
weights and caches of all layers, so that nothing is read twice from L2; a figure is the median of
20 replays, divided by the launches of one. Attention is also called by itself without a graph, as
eager code does, the host's part included. Bytes count weights once, and keys and values once.
"""

import argparse
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtune_fused.build import load_kernels
from torchtune_fused.kernels.timing import called_microseconds
from torchtune_fused.kernels.timing import captured_microseconds as microseconds
from torchtune_fused.ops import attention_decode
from torchtune_fused.ops.decode_attend import decode_attend
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import decode_linear
from torchtune_fused.ops.decode_qkv import decode_qkv
from torchtune_fused.ops.decode_sample import decode_sample


@dataclass(frozen=True)
class Shape:
    layers: int
    dim: int
    hidden: int
    head_dim: int
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256


SHAPES = {"1B": Shape(16, 2048, 8192, 64), "8B": Shape(32, 4096, 14336, 128)}


def normal(*shape):
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, shape[-1] ** -0.5)


class Model:
    def __init__(self, name):
        s = self.shape = SHAPES[name]
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.layers = [
            {
                "qkv": [normal(q, s.dim), normal(kv, s.dim), normal(kv, s.dim)],
                "out": normal(s.dim, q),
                "gate": normal(s.hidden, s.dim),
                "up": normal(s.hidden, s.dim),
                "down": normal(s.dim, s.hidden),
                "norm": normal(s.dim).abs() + 0.5,
            }
            for _ in range(s.layers)
        ]
        self.head = normal(s.vocab, s.dim)
        angles = torch.rand(1 << 16, s.head_dim // 2, device="cuda") * 6.28
        self.rope = (angles.cos(), angles.sin())

    def fill_caches(self, batch, context):
        s = self.shape
        size = (2, batch, s.kv_heads, context + 256, s.head_dim)
        self.caches = [torch.randn(size, device="cuda").bfloat16() for _ in range(s.layers)]
        self.cache_pos = torch.arange(context, 2 * context + 256, device="cuda")
        self.x = normal(batch, 1, s.dim)
        kv_bytes = s.layers * 2 * batch * s.kv_heads * context * s.head_dim * 2
        weights = [*self.layers[0]["qkv"], *(self.layers[0][w] for w in LINEARS)]
        return kv_bytes + s.layers * nbytes(*weights) + nbytes(self.head)

    def qkv(self, x, layer, cache):
        return decode_qkv(
            x, *layer["qkv"], *cache, self.cache_pos, norm_weight=layer["norm"], rope=self.rope
        )

    def attention(self, q, cache):
        return attention_decode(q, *cache, self.cache_pos[1:2])

    def gated(self, x, layer):
        return decode_gated(x, layer["gate"], layer["up"], norm_weight=layer["norm"])

    def unembed(self, x):
        norm = self.layers[0]["norm"]
        return decode_linear(x, self.head, norm_weight=norm, fp32_out=True)

    def step(self, attend=True):
        x = self.x
        for layer, cache in zip(self.layers, self.caches, strict=True):
            q = self.qkv(x, layer, cache)
            if attend:
                x = decode_attend(q, *cache, self.cache_pos[1:2], layer["out"], residual=x)
            else:
                x = decode_linear(q.transpose(1, 2).flatten(2), layer["out"], residual=x)
            x = decode_linear(self.gated(x, layer), layer["down"], residual=x)
        return self.unembed(x)


LINEARS = ("out", "gate", "up", "down")


def nbytes(*tensors):
    return sum(t.nbytes for t in tensors)


def report(case, time, size=None):
    speed = "" if size is None else f"{size / time / 1e6:6.3f} TB/s"
    print(f"{case:56s} {time:9.2f} us  {speed}", flush=True)


def steps(name, model):
    for batch, context in [(1, 512), (1, 8192), (1, 32768), (8, 2048), (16, 2048)]:
        if name == "8B" and context > 8192:
            continue
        size = model.fill_caches(batch, context)
        report(f"{name} step, batch {batch}, context {context}", microseconds(model.step), size)
    size = model.fill_caches(1, 512)
    report(f"{name} step without attention", microseconds(lambda: model.step(False)))


def kernels(name, model):
    model.fill_caches(1, 512)
    s, x, pairs = model.shape, model.x, list(zip(model.layers, model.caches, strict=True))
    q, hidden = normal(1, s.heads, 1, s.head_dim), normal(1, 1, s.hidden)
    seen = q.transpose(1, 2).flatten(2)
    first = model.layers[0]
    for case, run, weights in [
        ("qkv", lambda w, c: model.qkv(x, w, c), first["qkv"]),
        ("attention", lambda w, c: model.attention(q, c), None),
        ("out", lambda w, c: decode_linear(seen, w["out"], residual=x), [first["out"]]),
        ("gate/up", lambda w, c: model.gated(x, w), [first["gate"], first["up"]]),
        ("down", lambda w, c: decode_linear(hidden, w["down"], residual=x), [first["down"]]),
    ]:
        time = microseconds(lambda run=run: [run(w, c) for w, c in pairs], len(pairs))
        report(f"{name} {case}", time, weights and nbytes(*weights))
    report(f"{name} head", microseconds(lambda: model.unembed(x)), nbytes(model.head))


def attention():
    for batch, length, d in [(1, 8192, 128), (16, 4096, 128), (1, 32768, 64), (8, 2048, 128)]:
        size = batch * 8 * length * d * 4
        caches = [
            torch.randn(2, batch, 8, length, d, device="cuda").bfloat16()
            for _ in range(max(2, min(8, 2**30 // size)))
        ]
        q, slots = normal(batch, 32, 1, d), torch.tensor([length], device="cuda")
        mask = torch.ones(batch, 1, length, dtype=torch.bool, device="cuda")

        def cudnn(cache, q=q):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, *cache, enable_gqa=True)

        for who, run in [
            ("ours", lambda c, q=q, n=slots: attention_decode(q, *c, n)),
            ("ours, mask", lambda c, q=q, n=slots, m=mask: attention_decode(q, *c, n, m)),
            ("cuDNN", cudnn),
        ]:
            time = microseconds(lambda run=run, cs=caches: [run(c) for c in cs], len(caches))
            report(f"attention 32/8, {batch} x {length}, D {d}: {who}", time, size)
            time = called_microseconds([partial(run, c) for c in caches])
            report(f"attention 32/8, {batch} x {length}, D {d}: {who}, eager", time, size)


def sampling():
    logits, rng = torch.randn(1, 128256, device="cuda"), torch.tensor([1, 0], device="cuda")
    for case, run in [
        ("torch.argmax", lambda: logits.argmax(-1)),
        ("decode_sample, greedy", lambda: decode_sample(logits, rng, temperature=0.0)),
        ("decode_sample, temperature 1", lambda: decode_sample(logits, rng)),
    ]:
        report(f"1 x 128256 {case}", microseconds(lambda run=run: [run() for _ in range(20)], 20))


def ceilings():
    x = torch.randn(2**29, device="cuda").bfloat16()
    y = torch.empty_like(x)
    report("copy 1 GiB", microseconds(lambda: y.copy_(x)), 2 * x.nbytes)
    report("read 1 GiB (amax)", microseconds(lambda: x.view(-1, 4096).amax(1)), x.nbytes)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = ["ceilings", "sampling", "attention", "1B", "8B"]
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    chosen = parser.parse_args().cases
    if not load_kernels():
        raise SystemExit("the kernels are not usable; see `torchtune-fused doctor`")
    for case, run in [("ceilings", ceilings), ("sampling", sampling), ("attention", attention)]:
        if case in chosen:
            run()
    for name in SHAPES:
        if name in chosen:
            torch.manual_seed(0)
            model = Model(name)
            kernels(name, model)
            steps(name, model)
            del model


if __name__ == "__main__":
    main()
