"""Every decode kernel once on small shapes, for NVIDIA's sanitizer to watch.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize_decode.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_decode.py
"""

import torch

from torchtune_fused.build import load_kernels
from torchtune_fused.ops import attention_decode
from torchtune_fused.ops.decode_gated import decode_gated
from torchtune_fused.ops.decode_linear import decode_linear
from torchtune_fused.ops.decode_qkv import decode_qkv
from torchtune_fused.ops.decode_sample import decode_sample


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda").to(dtype)


def linears():
    # The second k is too long for 16 tokens to stay in shared memory.
    for tokens, n, k in [(1, 37, 72), (3, 48, 1160), (16, 24, 4104)]:
        x, scale, weight = normal(tokens, 1, k), normal(k), normal(n, k)
        decode_linear(x, weight, normal(n), residual=normal(tokens, 1, n), norm_weight=scale)
        decode_linear(x, weight, fp32_out=True)
        decode_gated(x, weight, normal(n, k), norm_weight=scale)


def projections():
    tables = torch.rand(32, 8, device="cuda"), torch.rand(32, 8, device="cuda")
    for interleaved, norms in [(True, None), (False, (normal(16), normal(16)))]:
        caches = [normal(2, 2, 9, 16) for _ in range(2)]
        weights = normal(64, 72), normal(32, 72), normal(32, 72)
        # The last slot is free, and the one after it does not exist.
        cache_pos = torch.arange(8, 17, device="cuda")
        decode_qkv(
            normal(2, 2, 72),
            *weights,
            *caches,
            cache_pos,
            rope=tables,
            interleaved=interleaved,
            head_norms=norms,
        )


def attentions():
    for d in (40, 64, 80, 96, 128, 256):
        for length, max_len in [(1, 7), (150, 150), (77, 1000)]:
            caches = [normal(2, 2, max_len, d) for _ in range(2)]
            mask = torch.rand(1, 1, max_len, device="cuda") < 0.5
            slots = torch.tensor([length], device="cuda")
            attention_decode(normal(2, 6, 1, d), *caches, slots)
            attention_decode(normal(2, 6, 1, d), *caches, slots, mask, window=50)


def samples():
    logits, rng = torch.randn(3, 5001, device="cuda"), torch.tensor([1, 0], device="cuda")
    for options in ({"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}):
        decode_sample(logits, rng, **options)
    decode_sample(logits, rng, top_k=50, top_p=0.9)


if __name__ == "__main__":
    assert load_kernels(), "the kernels are not usable; see `torchtune-fused doctor`"
    linears()
    projections()
    attentions()
    samples()
    torch.cuda.synchronize()
