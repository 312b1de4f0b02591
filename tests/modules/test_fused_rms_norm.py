import copy

import pytest
import torch
from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm

from torchtune_fused.modules import FusedGemmaRMSNorm, FusedRMSNorm

BOTH = pytest.mark.parametrize(
    "classes", [(FusedRMSNorm, RMSNorm), (FusedGemmaRMSNorm, GemmaRMSNorm)], ids=["", "gemma"]
)


def pair(classes=(FusedRMSNorm, RMSNorm), dim=48, eps=1e-5):
    fused, stock = classes[0], classes[1](dim, eps)
    nn.init.normal_(stock.scale)
    return fused.from_stock(copy.deepcopy(stock)), stock


@BOTH
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 7, 48), (2, 3, 5, 48)], ids=str)
def test_as_torchtune(classes, shape, assert_same):
    assert_same(*pair(classes), [torch.randn(shape)])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, None], ids=["fp32 scale", "low scale"])
def test_low_precision(classes, dtype, scale_dtype):
    fused, stock = (module.to(scale_dtype or dtype) for module in pair(classes))
    x = torch.randn(5, 48, dtype=dtype)
    # Both round once, from fp32: they differ where that falls on the edge between two values.
    torch.testing.assert_close(fused(x), stock(x), rtol=torch.finfo(dtype).eps, atol=0)


@BOTH
def test_a_subclass_of_tensor_is_left_to_torchtune(classes):
    class Tagged(torch.Tensor):
        pass

    fused, stock = pair(classes)
    x = torch.randn(3, 48).as_subclass(Tagged)
    assert type(fused(x)) is Tagged
    assert torch.equal(fused(x), stock(x))


def test_shares_everything_with_the_stock_module():
    _, stock = pair()
    fused = FusedRMSNorm.from_stock(stock)
    assert fused.scale is stock.scale
    assert type(FusedRMSNorm(8, eps=0.5)(torch.randn(8))) is torch.Tensor
    with pytest.raises(TypeError, match="takes a RMSNorm, got FusedRMSNorm"):
        FusedRMSNorm.from_stock(fused)
