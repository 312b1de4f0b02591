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

# True: neighbouring channels are rotated, by a cache [max_seq_len, d / 2, 2] of (cos, sin).
# False: channels d / 2 apart are, by a cache [max_seq_len, 2 * d] of (cos, cos, sin, sin).
_STYLES = {
    RotaryPositionalEmbeddings: True,
    Llama3ScaledRoPE: True,
    Qwen2RotaryPositionalEmbeddings: False,
    Phi3RotaryPositionalEmbeddings: False,
}


def rope_tables(module: nn.Module | None) -> tuple[Tensor, Tensor, bool] | None:
    """The arguments of the op that stand for a module of rotary embeddings.

    Args:
        module (nn.Module | None): a layer's ``pos_embeddings``.

    Returns:
        tuple[Tensor, Tensor, bool] | None: cosines and sines ``[max_seq_len, d / 2]``, views of the
        module's cache, and whether pairs are interleaved. None if the module is not one of
        torchtune's, or calling it does more than rotate.
    """
    cls = type(module)
    # Llama3ScaledRoPE has no cache before it is initialised off the meta device, and says so.
    if cls not in _STYLES or not is_plain(module, cls) or "cache" not in module._buffers:
        return None
    interleaved = _STYLES[cls]
    if interleaved:
        cos, sin = module.cache.unbind(-1)
    else:
        cos, _, sin, _ = module.cache.chunk(4, dim=-1)
    return cos, sin, interleaved


def rotation(module: nn.Module) -> Callable[..., Tensor]:
    """What to call as ``f(x, input_pos=...)`` to rotate queries or keys: the op, or ``module``."""
    tables = rope_tables(module)
    if tables is None:
        return module
    cos, sin, interleaved = tables
    return partial(rope, cos=cos, sin=sin, interleaved=interleaved)
