"""BlockMasks where there is no kernel for them: as dense masks, made once for all layers."""

from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask

_dense: WeakKeyDictionary[BlockMask, Tensor] = WeakKeyDictionary()


def dense_mask(mask: BlockMask) -> Tensor:
    """The bool mask of shape ``[b or 1, h or 1, s, s_kv]`` that a BlockMask stands for.

    It is kept for as long as the BlockMask lives, so that the layers of a model share one.
    """
    if mask not in _dense:
        _dense[mask] = create_mask(mask.mask_mod, *mask.shape, device=mask.kv_num_blocks.device)
    return _dense[mask]
