"""Self-attention with rotary position embeddings, from the projections of its input on.

Vaswani et al., https://arxiv.org/abs/1706.03762; Su et al., RoFormer,
https://arxiv.org/abs/2104.09864. It is `qkv_linear`, `rope` and `attention` in one: queries and
keys are rotated before they are first written, on Hopper inside of the product, and their gradients
are turned back where the backward pass of attention has them at hand.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtune_fused.ops._library import LIBRARY, call, define_op, register_autograd
from torchtune_fused.ops.adapters import AdaptedLinear
from torchtune_fused.ops.attention import attention, attention_gradients, has_kernel
from torchtune_fused.ops.attention_mask import (
    MaskTiles,
    check_documents,
    check_mask,
    check_window,
    mask_tiles,
)
from torchtune_fused.ops.qk_norm_rope import qk_norm_rope
from torchtune_fused.ops.qkv_linear import (
    check_layers,
    fake_projections,
    kept_tensors,
    project,
    projection_gradients,
    qkv_linear,
)
from torchtune_fused.ops.rope import Rotation, check_angles


def rotary_self_attention(
    x: Tensor,
    q: AdaptedLinear,
    k: AdaptedLinear,
    v: AdaptedLinear,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor | None = None,
    mask: Tensor | MaskTiles | None = None,
    *,
    interleaved: bool,
    causal: bool = False,
    window: int | None = None,
    documents: Tensor | None = None,
    scale: float = 1.0,
    adapter_inputs: Sequence[Tensor | None] = (None, None, None),
) -> Tensor:
    """Attention of every token to the tokens it sees, before the output projection.

    Args:
        x (Tensor): input of shape ``[b, s, in]``.
        q (AdaptedLinear): the projection to queries, ``in`` to ``h * d``, as `qkv_linear` takes it.
        k (AdaptedLinear): to keys, ``in`` to ``h_kv * d``, where ``h_kv`` divides ``h``.
        v (AdaptedLinear): to values, as ``k``.
        cos (Tensor): cosines of shape ``[max_seq_len, d / 2]``, as `rope` takes them.
        sin (Tensor): sines, as ``cos``.
        input_pos (Tensor | None): positions of the tokens, as `rope` takes them.
        mask (Tensor | MaskTiles | None): who sees whom, as `attention` takes it.
        interleaved (bool): whether pairs ``(2i, 2i + 1)`` are rotated, or ``(i, i + d / 2)``.
        causal (bool): whether later tokens are hidden.
        window (int | None): how many tokens a token sees at most, counting back from itself.
        documents (Tensor | None): int32 of shape ``[2, b, s]``, from `document_bounds`.
        scale (float): factor of the adapters.
        adapter_inputs (Sequence[Tensor | None]): what adapters see, as `qkv_linear` takes it.

    Returns:
        Tensor: shape ``[b, s, h * d]``, dtype of ``x``.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a shape or device doesn't fit, ``window < 1``, or a position lies beyond
            ``max_seq_len`` (positions in ``input_pos`` are checked on the CPU only).
    """
    op, d = "rotary_self_attention", 2 * cos.shape[-1]
    layers = q, k, v
    tensors = check_layers(op, x, layers, adapter_inputs)
    widths = [layer.weight.shape[0] for layer in layers]
    h, h_kv = (width // d for width in widths[:2])
    if x.ndim != 3 or widths != [h * d, h_kv * d, h_kv * d] or h_kv == 0 or h % h_kv != 0:
        raise ValueError(
            f"{op}: needs x of shape [b, s, in] and projections to h heads of {d} channels and, "
            f"twice, to a divisor of h, got {list(x.shape)} and {widths} channels"
        )
    b, s, _ = x.shape
    heads = x.new_empty(()).expand(b, h, s, d)  # for the checks, without memory
    check_angles(op, "x", heads.transpose(1, 2), cos, sin, input_pos)
    check_documents(op, documents, heads)
    bits, kinds = check_mask(op, mask, heads, s)
    window = check_window(op, window, s)
    if x.is_cuda and not has_kernel(x, d):
        projected = qkv_linear(x, *layers, scale=scale, adapter_inputs=adapter_inputs)
        queries, keys, values = (t.unflatten(-1, (-1, d)) for t in projected)
        queries, keys = qk_norm_rope(queries, keys, cos, sin, input_pos, interleaved=interleaved)
        sequences = (t.transpose(1, 2) for t in (queries, keys, values))
        out = attention(*sequences, mask, causal=causal, window=window, documents=documents)
        return out.transpose(1, 2).flatten(2)
    if x.is_cuda and bits is not None and kinds is None:
        kinds, bits = mask_tiles(bits)
    rotation = cos, sin, input_pos, interleaved
    return call(op, x, *tensors, scale, *rotation, bits, kinds, documents, causal, window)[0]


# Queries and keys are rotated, [b, heads, s, d]; lse and low are those of attention and qkv_linear.
@define_op(
    "rotary_self_attention(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, "
    "Tensor? bias_q, Tensor? bias_k, Tensor? bias_v, Tensor? a_q, Tensor? a_k, Tensor? a_v, "
    "Tensor? b_q, Tensor? b_k, Tensor? b_v, Tensor? seen_q, Tensor? seen_k, Tensor? seen_v, "
    "float scale, Tensor cos, Tensor sin, Tensor? input_pos, bool interleaved, Tensor? mask, "
    "Tensor? mask_kinds, Tensor? documents, bool causal, int? window) -> "
    "(Tensor out, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor low)",
    composite=True,
)
def _forward(x, *arguments):
    projections, rotation, hidden = _by_step(arguments)
    *qkv, low = project(x, *projections, rotation=rotation)
    q, k, v = (_split_heads(t, rotation) for t in qkv)
    out, lse = call("attention", q, k, v, *_options(rotation, hidden))
    return _merge_heads(out), q, k, v, lse, low


def _by_step(arguments):
    """The op's arguments after x: of the projections, the rotation and attention."""
    return arguments[:16], Rotation(*arguments[16:20]), arguments[20:]


def _options(rotation, hidden):
    """What hides keys, as arguments of the op `attention`."""
    mask, kinds, documents, causal, window = hidden
    return mask, kinds, documents, causal, (2 * rotation.cos.shape[1]) ** -0.5, window, None


def _split_heads(x, rotation):
    return x.unflatten(-1, (-1, 2 * rotation.cos.shape[1])).transpose(1, 2)


def _merge_heads(x):
    return x.transpose(1, 2).flatten(2)


@torch.library.register_fake("torchtune_fused::rotary_self_attention", lib=LIBRARY)
def _(x, *arguments):
    projections, rotation, _ = _by_step(arguments)
    *qkv, low = fake_projections(x, *projections)
    q, k, v = (_split_heads(t, rotation) for t in qkv)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return x.new_empty(qkv[0].shape), q, k, v, lse, low


def _setup_context(ctx, inputs, output):
    x, *arguments = inputs
    (*tensors, ctx.scale), rotation, hidden = _by_step(arguments)
    out, q, k, v, lse, low = output
    *masks, ctx.causal, ctx.window = hidden
    *angles, ctx.interleaved = rotation
    projections = kept_tensors(x, tensors, low, ctx.needs_input_grad)
    ctx.save_for_backward(q, k, v, out, lse, *masks, *angles, *projections)


def _autograd(ctx, grad):
    q, k, v, out, lse, *others = ctx.saved_tensors
    masks, angles, projections = others[:3], others[3:6], others[6:]
    rotation = Rotation(*angles, ctx.interleaved)
    tensors = q, k, v, _split_heads(out, rotation), lse
    options = _options(rotation, (*masks, ctx.causal, ctx.window))
    grads = attention_gradients(_split_heads(grad, rotation), tensors, options, rotation)
    merged = [_merge_heads(t) for t in grads]
    needs = ctx.needs_input_grad[:16]
    return *projection_gradients(merged, projections, ctx.scale, needs), *[None] * 10


register_autograd("rotary_self_attention", _autograd, _setup_context)
