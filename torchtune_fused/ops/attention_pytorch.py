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
