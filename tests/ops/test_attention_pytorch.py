import pytest
import torch

from torchtune_fused.ops.attention_mask import visible
from torchtune_fused.ops.attention_pytorch import pytorch_attention


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("case", ["none", "causal", "mask"])
def test_pytorch_attention(case, softcap, exact_attention, obeys_the_rule, run_with_grads):
    q, k, v = (torch.randn(2, h, 9, 8) for h in (6, 2, 2))
    mask = torch.rand(2, 9, 9) < 0.5 if case == "mask" else None
    if mask is not None:
        mask[0, 3] = mask[1, :4] = False
    grad, causal = torch.randn(2, 6, 9, 8), case == "causal"
    seen = None if mask is None else visible(9, 9, mask.unsqueeze(1), False, None, None, q.device)

    def exact(q, k, v):
        return exact_attention(q, k, v, mask, causal=causal, scale=0.3, softcap=softcap)

    obeys_the_rule(
        run_with_grads(
            lambda *t: pytorch_attention(*t, seen, causal, 0.3, softcap), (q, k, v), grad
        ),
        run_with_grads(exact, (q, k, v), grad),
        run_with_grads(exact, (q, k, v), grad, torch.float64),
    )
