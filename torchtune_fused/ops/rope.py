"""Rotary position embeddings: pairs of channels are rotated by an angle that grows with position.

Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
https://arxiv.org/abs/2104.09864.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    at_least_fp32,
    call,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    define_op,
    register_autograd,
)


class Rotation(NamedTuple):
    """By what the heads of queries and keys are rotated, as `rope` takes it; None: not at all."""

    cos: Tensor | None
    sin: Tensor | None
    input_pos: Tensor | None
    interleaved: bool


NO_ROTATION = Rotation(None, None, None, False)


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None = None, *, interleaved: bool
) -> Tensor:
    """Rotates each head of ``x`` by the angles of its tokens' positions.

    The rotation is computed in fp32 (fp64 for fp64 input) and rounded once at the end.

    Args:
        x (Tensor): queries or keys of shape ``[b, s, h, d]``, any strides.
        cos (Tensor): cosines of shape ``[max_seq_len, d / 2]``, fp32, any strides (so that views of
            a cache that interleaves cosines and sines serve).
        sin (Tensor): sines, as ``cos``.
        input_pos (Tensor | None): position of each token, int32 or int64, of any shape that can be
            read as ``[1, s]`` or ``[b, s]``. None means 0, 1, … s - 1.
        interleaved (bool): True rotates the pairs ``(x[2i], x[2i + 1])`` as torchtune's Llama does,
            False the pairs ``(x[i], x[i + d / 2])`` as Qwen2, Phi-3 and Hugging Face do.

    Returns:
        Tensor: contiguous, shape and dtype of ``x``.

    Raises:
        TypeError: if a tensor has a dtype of the wrong kind.
        ValueError: if shapes or devices don't fit, or if a position lies beyond ``max_seq_len``
            (positions in ``input_pos`` are checked on the CPU only).
    """
    check_floating("rope", "x", x)
    if x.ndim != 4 or x.shape[3] % 2 != 0:
        raise ValueError(f"rope: x must have shape [b, s, h, d], d even, got {list(x.shape)}")
    check_angles("rope", "x", x, cos, sin, input_pos)
    return call("rope", x, cos, sin, input_pos, interleaved, False)


def check_angles(
    op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None
) -> None:
    """Raises unless cosines, sines and positions fit the tokens and channels of ``x``."""
    b, s, _, d = x.shape
    max_seq_len = cos.shape[0]
    check_floating(op, "cos", cos)
    check_shape(op, "cos", cos, (max_seq_len, d // 2))
    check_device(op, "cos", cos, name, x)
    check_tensor(op, "sin", sin, cos.shape, "cos", cos)
    if input_pos is None:
        if s > max_seq_len:
            raise ValueError(
                f"{op}: {name} has {s} tokens, but cos and sin only {max_seq_len} positions; "
                "build the cache for a larger max_seq_len"
            )
        return
    if input_pos.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: input_pos must be int32 or int64, got {input_pos.dtype}")
    if input_pos.numel() not in (s, b * s):
        raise ValueError(
            f"{op}: input_pos must have {s} or {b} x {s} elements, one for each token of {name}, "
            f"got shape {list(input_pos.shape)}"
        )
    check_device(op, "input_pos", input_pos, name, x)


@define_op(
    "rope(Tensor x, Tensor cos, Tensor sin, Tensor? input_pos, bool interleaved, bool inverse) -> "
    "Tensor"
)
def _rope(
    x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    rotate = rotation("rope", x, cos, sin, input_pos, interleaved, inverse)
    return rotate(at_least_fp32(x)).type_as(x)


def rotation(
    op: str,
    like: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> Callable[[Tensor], Tensor]:
    """The rotation of the tokens of ``like``, for any number of heads in at least fp32."""
    s, pairs = like.shape[1], cos.shape[1]
    if input_pos is None:
        cos, sin = cos[:s], sin[:s]
    else:
        cos, sin = _gather(op, cos, sin, input_pos)
    exact = like.dtype == torch.float64
    cos, sin = (cos.double(), sin.double()) if exact else (cos.float(), sin.float())
    if inverse:
        sin = -sin
    if interleaved:
        # A pair is a complex number and the rotation one product: a single pass over x.
        turn = torch.complex(cos, sin).view(-1, s, 1, pairs)
        return lambda x: (_aligned(x).view(turn.dtype) * turn).view(x.dtype)

    cos, sin = torch.cat((cos, cos), -1).view(-1, s, 1, 2 * pairs), sin.view(-1, s, 1, pairs)

    def rotate(x: Tensor) -> Tensor:
        x = x.contiguous()
        first, second = x.chunk(2, dim=-1)
        rotated = x * cos
        rotated_first, rotated_second = rotated.chunk(2, dim=-1)
        rotated_first.addcmul_(second, sin, value=-1)
        rotated_second.addcmul_(first, sin)
        return rotated

    return rotate


def _gather(op: str, cos: Tensor, sin: Tensor, input_pos: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each token's position."""
    positions = input_pos.reshape(-1)
    try:
        return cos.index_select(0, positions), sin.index_select(0, positions)
    except IndexError:
        raise ValueError(
            f"{op}: input_pos has positions from {int(positions.min())} to "
            f"{int(positions.max())}, but cos and sin are for 0 to {cos.shape[0] - 1}"
        ) from None


def _aligned(x: Tensor) -> Tensor:
    """``x``, contiguous, with pairs where complex numbers may lie in its storage."""
    x = x.contiguous()
    return x if x.storage_offset() % 2 == 0 else x.clone()


@torch.library.register_fake("torchtune_fused::rope", lib=LIBRARY)
def _(x, cos, sin, input_pos, interleaved, inverse):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, input_pos, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, input_pos)


def _autograd(ctx, grad):
    # A rotation is orthogonal: its transpose is the rotation by the opposite angle.
    grad_x = call("rope", grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return grad_x, None, None, None, None, None


register_autograd("rope", _autograd, _setup_context, twice=True)
