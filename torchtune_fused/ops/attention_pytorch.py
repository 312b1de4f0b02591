"""PyTorch's own attention: for what the kernels don't take, and where it is the faster one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_fused.ops._library import at_least_fp32

_cudnn_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


def pytorch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention by PyTorch, in linear memory where no mask is needed; differentiable.

    Args:
        q (Tensor): ``[b, h, s, d]``.
        k (Tensor): ``[b, h_kv, s_kv, d]``.
        v (Tensor): as ``k``.
        seen (Tensor | None): bool, broadcasts to ``[b, h, s, s_kv]``.
        causal (bool): whether later keys are hidden; not together with ``seen``.
        scale (float): factor of the scores.
        softcap (float | None): bound of the scores.

    Returns:
        Tensor: shape and dtype of ``q``; zeros where a query sees nothing.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if softcap is not None and causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    # A row without keys has no softmax: it sees all of them here, and is zeroed in the end.
    empty = None if seen is None else ~seen.any(-1, keepdim=True)
    seen = None if seen is None else seen | empty
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scale)
    else:
        scores = softcap * torch.tanh(at_least_fp32(q) @ at_least_fp32(k).mT * (scale / softcap))
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        out = (scores.softmax(-1) @ at_least_fp32(v)).to(q.dtype)
    return out if empty is None else out.masked_fill(empty, 0)


def cudnn_is_faster(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, hidden: bool, deterministic: bool
) -> bool:
    """Who computes the gradients of `attention` on CUDA: cuDNN or our kernel.

    ======================  =========  ==========================================================
    case                    who        why
    ======================  =========  ==========================================================
    9.0, d = 64 or 128      ours       our Hopper kernel is as fast or faster: see
                                       kernels/attention/PERFORMANCE.md
    9.0, another d, causal  cuDNN      the faster one there
    or no mask
    any other mask          ours       skips what is hidden; cuDNN would need it as s x s numbers
    other GPUs              ours       all run on mma there
    deterministic           ours       cuDNN doesn't promise the order of its sums
    a layout that is not    ours       PyTorch caches cuDNN's plans by the strides of q, k and v,
    [b, s, h, d]                       and would take one made for another layout of the output
    ======================  =========  ==========================================================

    Args:
        q (Tensor): queries, as `attention` was given them.
        k (Tensor): keys.
        v (Tensor): values.
        causal (bool): whether later keys are hidden.
        hidden (bool): whether anything but ``causal`` changes the scores.
        deterministic (bool): whether the same bits are asked for in every run.

    Returns:
        bool: True for cuDNN.
    """
    d, s = q.shape[-1], q.shape[2]
    return (
        not (hidden or deterministic or d in (64, 128))
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and s > 1  # which cuDNN refuses
        and (not causal or s == k.shape[2])
        and all(t.stride(0) >= t.stride(2) >= t.stride(1) >= t.stride(3) for t in (q, k, v))
    )


def cudnn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention by cuDNN, from the output and log-sum-exp of our kernel.

    ``grad`` and ``out`` must be ``[b, s, h, d]`` in memory.
    """
    no_dropout = lse.new_empty(0, dtype=torch.int64)
    return _cudnn_backward(
        *(grad, q, k, v, out, lse.unsqueeze(-1), no_dropout, no_dropout, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, causal),
        scale=scale,
    )
