"""How a torchtune module of rotary embeddings maps onto the fused op."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.phi3 import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings

from torchtune_fused.modules._plain import is_plain
from torchtune_fused.ops import rope

# A cache [max_seq_len, d / 2, 2] of (cos, sin), which rotates neighbouring channels.
_INTERLEAVED = (RotaryPositionalEmbeddings, Llama3ScaledRoPE)
# A cache [max_seq_len, 2 * d] of cos, cos, sin, sin, which rotates a channel with one d / 2 away.
_HALVES = (Qwen2RotaryPositionalEmbeddings, Phi3RotaryPositionalEmbeddings)


def rotation(module: nn.Module) -> Callable[..., Tensor]:
    """What to call, as ``f(x, input_pos=...)``, to rotate the queries or keys of a layer.

    Args:
        module (nn.Module): the layer's ``pos_embeddings``.

    Returns:
        Callable[..., Tensor]: the fused op on views of the module's cache if the module is one of
        torchtune's, else the module itself.
    """
    cls = type(module)
    # Llama3ScaledRoPE has no cache before it is initialised off the meta device, and says so.
    if not is_plain(module, cls) or "cache" not in module._buffers:
        return module
    if cls in _INTERLEAVED:
        cos, sin = module.cache.unbind(-1)
        return partial(rope, cos=cos, sin=sin, interleaved=True)
    if cls in _HALVES:
        cos, _, sin, _ = module.cache.chunk(4, dim=-1)
        return partial(rope, cos=cos, sin=sin, interleaved=False)
    return module
