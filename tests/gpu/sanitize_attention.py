"""Every kernel for attention of many queries once on small shapes, for NVIDIA's sanitizer.

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
compute-sanitizer --tool memcheck --error-exitcode 1 python tests/gpu/sanitize_attention.py
compute-sanitizer --tool racecheck --error-exitcode 1 python tests/gpu/sanitize_attention.py
"""

import torch

from torchtune_fused.build import load_kernels
from torchtune_fused.ops import attention, attention_decode, document_bounds, mask_tiles


def normal(*shape):
    return torch.randn(shape, device="cuda").bfloat16()


def masks(s):
    mask = torch.rand(2, s, s, device="cuda") < 0.5
    mask[1, : s // 2] = False
    ids = torch.randint(0, 4, (2, s), device="cuda").sort().values
    return [
        {},
        {"causal": True},
        {"causal": True, "window": 50, "softcap": 2.0},
        {"causal": True, "documents": document_bounds(ids)},
        {"mask": mask},
    ]


def training():
    # Heads first in memory, so that our own kernels compute the gradients.
    for d in (64, 80, 96, 128, 256):
        for s in (1, 67, 200):
            tensors = [normal(2, h, s, d).requires_grad_() for h in (4, 2, 2)]
            for options in masks(s):
                attention(*tensors, **options).backward(normal(2, 4, s, d))


def deterministic():
    torch.use_deterministic_algorithms(True)
    training()
    torch.use_deterministic_algorithms(False)


def prefill():
    for d in (64, 128):
        for s, length, max_len in [(17, 17, 17), (67, 150, 201)]:
            caches = [normal(2, 2, max_len, d) for _ in range(2)]
            slots = torch.tensor([length], device="cuda")
            mask = torch.rand(1, s, max_len, device="cuda") < 0.5
            attention_decode(normal(2, 4, s, d), *caches, slots)
            attention_decode(normal(2, 4, s, d), *caches, slots, mask, window=50)


def tiles():
    for shape in ((1, 1, 1), (3, 65, 127), (2, 130, 1600)):
        mask_tiles(torch.rand(shape, device="cuda") < 0.5)


if __name__ == "__main__":
    assert load_kernels(), "the kernels are not usable; see `torchtune-fused doctor`"
    tiles()
    training()
    deterministic()
    prefill()
    torch.cuda.synchronize()
