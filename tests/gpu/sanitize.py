"""Every kernel on small shapes, for NVIDIA's sanitizer to watch; arguments choose families.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize.py decode sampling
"""

import sys

import torch

from torchtune_fused.build import load_kernels
from torchtune_fused.ops import (
    AdaptedLinear,
    adamw_,
    add_rms_norm,
    attention,
    attention_decode,
    decode_attend,
    decode_embed_,
    decode_gated,
    decode_linear,
    decode_qkv,
    decode_sample,
    document_bounds,
    gated_mlp,
    kv_cache_update,
    linear_cross_entropy,
    lora_gated_mlp,
    lora_linear,
    mask_tiles,
    qk_norm_rope,
    qk_norm_rope_append,
    qkv_linear,
    rms_norm,
    rotary_self_attention,
    tied_embedding,
)

DEVICE = "cuda"


def normal(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def weight(*shape):
    return (normal(*shape) / shape[-1] ** 0.5).requires_grad_()


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])


def decode():
    # The second k is too long for 16 tokens to stay in shared memory.
    for tokens, n, k in [(1, 37, 72), (3, 48, 1160), (16, 24, 4104)]:
        x, scale, matrix = normal(tokens, 1, k), normal(k), normal(n, k)
        decode_linear(x, matrix, normal(n), residual=normal(tokens, 1, n), norm_weight=scale)
        decode_linear(x, matrix, fp32_out=True)
        decode_gated(x, matrix, normal(n, k), norm_weight=scale)
        decode_embed_(normal(tokens, k), torch.randint(n, (tokens,), device=DEVICE), matrix)
    tables = torch.rand(32, 8, device=DEVICE), torch.rand(32, 8, device=DEVICE)
    for interleaved, norms in [(True, None), (False, (normal(16), normal(16)))]:
        caches = [normal(2, 2, 9, 16) for _ in range(2)]
        # The last slot is free, and the one after it does not exist.
        decode_qkv(
            normal(2, 2, 72),
            *(normal(64, 72), normal(32, 72), normal(32, 72)),
            *caches,
            torch.arange(8, 17, device=DEVICE),
            rope=tables,
            interleaved=interleaved,
            head_norms=norms,
        )
    for length, max_len in [(1, 3), (150, 150), (900, 1000)]:
        caches = [normal(1, 2, max_len, 64) for _ in range(2)]
        slots = torch.tensor([length], device=DEVICE)
        for mask in (None, torch.rand(1, 1, max_len, device=DEVICE) < 0.5):
            arguments = (normal(1, 6, 1, 64), *caches, slots, normal(24, 384))
            decode_attend(*arguments, residual=normal(1, 1, 24), mask=mask)


def cached_attention():
    for d in (40, 64, 80, 96, 128, 256):
        shapes = [(1, 1, 7), (1, 150, 150), (1, 77, 1000)]
        if d in (64, 128):
            shapes += [(17, 17, 17), (67, 150, 201)]
        for s, length, max_len in shapes:
            caches = [normal(2, 2, max_len, d) for _ in range(2)]
            mask = torch.rand(1, s, max_len, device=DEVICE) < 0.5
            slots = torch.tensor([length], device=DEVICE)
            attention_decode(normal(2, 6, s, d), *caches, slots)
            attention_decode(normal(2, 6, s, d), *caches, slots, mask, window=50)


def sampling():
    logits, rng = torch.randn(3, 5001, device=DEVICE), torch.tensor([1, 0], device=DEVICE)
    for options in ({"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}):
        decode_sample(logits, rng, **options)
    decode_sample(logits, rng, top_k=50, top_p=0.9)


def attentions(deterministic=False):
    torch.use_deterministic_algorithms(deterministic)
    for s in (1, 67, 200):
        mask = torch.rand(2, s, s, device=DEVICE) < 0.5
        mask[1, : s // 2] = False
        ids = torch.randint(0, 4, (2, s), device=DEVICE).sort().values
        mask_tiles(mask)
        for options in (
            {},
            {"causal": True},
            {"causal": True, "window": 50, "softcap": 2.0},
            {"causal": True, "documents": document_bounds(ids)},
            {"mask": mask},
        ):
            for d in (64, 80, 96, 128, 256):
                # Heads first in memory, so that our own kernels compute the gradients.
                tensors = [normal(2, h, s, d).requires_grad_() for h in (4, 2, 2)]
                backward(attention(*tensors, **options))
    torch.use_deterministic_algorithms(False)


def rotated_attention():
    ops, options = torch.ops.torchtune_fused, (None, None, None, True, 0.1, None, None)
    tables = torch.rand(2, 200, 64, device=DEVICE)
    for s, d in [(67, 64), (200, 128), (130, 96)]:
        tensors = [normal(2, s, h, d).transpose(1, 2) for h in (5, 1, 1)]
        out, lse = ops.attention(*tensors, *options)
        rotation = *(t[:, : d // 2] for t in tables), None
        for interleaved in (True, False):
            ops.attention_backward(
                *(out, *tensors, out, lse, *options), False, *rotation, interleaved
            )


def attention_rings():
    # More tiles than multiprocessors and more blocks of keys than slots, so that the Hopper kernels
    # use every slot again.
    for d in (64, 96, 128, 256):
        tensors = [normal(2, h, 600, d).requires_grad_(d in (64, 128)) for h in (40, 8, 8)]
        for causal in (True, False):
            out = attention(*tensors, causal=causal)
            if out.requires_grad:
                backward(out)


def norms_and_rotations():
    for rows, dim in [(1, 64), (67, 64), (5, 2048), (3, 4096 + 8)]:
        x, residual = (normal(rows, dim).requires_grad_() for _ in range(2))
        backward(rms_norm(x, weight(dim), 1e-6))
        backward(*add_rms_norm(x, residual, weight(dim), 1e-6))
    for d in (64, 128):
        tables = torch.rand(2, 67, d // 2, device=DEVICE)
        for norms in (None, (weight(d), weight(d))):
            heads = [normal(2, 67, h, d).requires_grad_() for h in (4, 2)]
            backward(*qk_norm_rope(*heads, *tables, interleaved=True, head_norms=norms))
    caches = [normal(2, 2, 70, 64) for _ in range(2)]
    slots = torch.arange(70, device=DEVICE)
    kv_cache_update(*caches, slots, normal(2, 2, 33, 64), normal(2, 2, 33, 64))
    tables = torch.rand(2, 67, 32, device=DEVICE)
    heads = [normal(2, 33, h, 64) for h in (4, 2, 2)]
    with torch.no_grad():
        qk_norm_rope_append(*heads, *caches, slots, *tables, interleaved=True)


def products():
    # So many tokens are for Hopper's own products; no tile is full.
    for tokens, dim, hidden in [(5, 72, 104), (520, 136, 200)]:
        x = normal(tokens, dim).requires_grad_()
        backward(gated_mlp(x, weight(hidden, dim), weight(hidden, dim), weight(dim, hidden)))
        adapted = [
            AdaptedLinear(weight(o, i).detach(), weight(16, i), weight(o, 16))
            for i, o in ((dim, hidden), (dim, hidden), (hidden, dim))
        ]
        backward(lora_gated_mlp(x, *adapted, scale=2.0))
        backward(lora_linear(x, *adapted[0][:3], scale=2.0))
        backward(*qkv_linear(x, *adapted[:2], AdaptedLinear(weight(hidden, dim))))
        targets = torch.randint(hidden, (tokens,), device=DEVICE)
        backward(linear_cross_entropy(x, weight(hidden, dim), targets))
        backward(*tied_embedding(targets, weight(hidden, dim)))
    # As many tiles as a sum of products takes a kernel of its own for.
    x, residual = normal(66 * 256 - 1, 72), normal(66 * 256 - 1, 72).requires_grad_()
    matrices = weight(104, 72), weight(104, 72), weight(72, 104)
    backward(gated_mlp(x, *matrices, residual=residual))
    x, matrices = normal(1, 22 * 256 - 1, 72).requires_grad_(), [weight(192, 72) for _ in range(3)]
    tables = torch.rand(22 * 256, 32, 2, device=DEVICE).unbind(-1)
    layers = (AdaptedLinear(matrix) for matrix in matrices)
    backward(rotary_self_attention(x, *layers, *tables, interleaved=True, window=64, causal=True))
    # As many tiles as gradients of several weights have a kernel of their own for.
    grads = [normal(65, 4096) for _ in range(2)]
    torch.ops.torchtune_fused.weight_gradients(grads, normal(65, 1024))


def optimizer():
    # More tensors than a launch takes, of sizes that are no multiple of anything, in and out of
    # line with 16 bytes.
    sizes = [37 * i % 5000 for i in range(80)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        lists = [
            [torch.rand(n + i % 2, device=DEVICE).to(dtype)[i % 2 :] for i, n in enumerate(sizes)]
            for _ in range(4)
        ]
        steps = [torch.ones((), device=DEVICE) for _ in sizes]
        options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        adamw_(*lists, steps, **options)


FAMILIES = {
    "decode": decode,
    "cached_attention": cached_attention,
    "sampling": sampling,
    "attention": attentions,
    "rotated_attention": rotated_attention,
    "attention_rings": attention_rings,
    "deterministic_attention": lambda: attentions(deterministic=True),
    "norms_and_rotations": norms_and_rotations,
    "products": products,
    "optimizer": optimizer,
}

if __name__ == "__main__":
    assert load_kernels(), "the kernels are not usable; see `torchtune-fused doctor`"
    for family in sys.argv[1:] or FAMILIES:
        FAMILIES[family]()
        torch.cuda.synchronize()
        print(f"{family}: ran to its end", flush=True)
