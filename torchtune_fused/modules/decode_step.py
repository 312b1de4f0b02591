"""A decoder on the decoding ops: five launches a layer for the few tokens of a step."""

import torch
from torch import Tensor, nn
from torchtune.modules import (
    KVCache,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from torchtune_fused.modules._plain import is_plain
from torchtune_fused.modules.attention import FusedAttention
from torchtune_fused.modules.feed_forward import FusedFeedForward, activation_name
from torchtune_fused.modules.rms_norm import FusedRMSNorm
from torchtune_fused.modules.rope import rope_tables
from torchtune_fused.modules.transformer_layer import FusedTransformerSelfAttentionLayer
from torchtune_fused.ops import decode_attend, decode_gated, decode_linear, decode_qkv


class DecodeStep:
    """All of a decoder but its embedding for up to 16 tokens, with KV caches, without gradients.

    The modules themselves are not called: their weights go to ops that fuse across them (norm with
    projection, projection with residual). :meth:`obstacle` says why a decoder can't be run so.

    Args:
        decoder (TransformerDecoder): A decoder without an obstacle, with its KV caches enabled.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        self._decoder = decoder
        # Layers share their rotary embeddings. A model cast to bf16 has cast their tables too.
        self._rope: dict[nn.Module | None, tuple | None] = {}
        for layer in decoder.layers:
            module = layer.attn.pos_embeddings
            if module not in self._rope:
                self._rope[module] = None if module is None else _fp32_tables(module)

    @staticmethod
    def obstacle(decoder: TransformerDecoder) -> str | None:
        """Why the decoder must be run by calling its modules; None if it need not.

        Args:
            decoder (TransformerDecoder): Any decoder.

        Returns:
            str | None: One line that names the first module in the way.
        """
        for name, layer in decoder.layers.named_children():
            if (what := _layer_obstacle(layer)) is not None:
                return f"layers.{name}.{what}"
        return None

    def __call__(self, h: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        """Run the layers and, if the decoder has it, the head; advance the KV caches.

        Args:
            h (Tensor): Hidden state before the first layer ``[b, s, embed_dim]``.
            mask (Tensor | None): bool ``[b or 1, s, cache length]``; None is causal by slot.
            input_pos (Tensor | None): Positions ``[s]`` or ``[b, s]``; None: each token's slot.

        Returns:
            Tensor: fp32 logits ``[b, s, vocab_size]`` or, for a decoder without a head, the hidden
            state after the last layer.
        """
        decoder, new = self._decoder, h.shape[1]
        if input_pos is not None:
            input_pos = input_pos.long()  # torchtune counts the positions of padded rows in int32
        for layer in decoder.layers:
            h = _run_layer(layer, h, mask, input_pos, self._rope[layer.attn.pos_embeddings])
        advanced = self._advance_caches(new)
        out = h if decoder.norm is None else self._unembed(h)
        if advanced is not None:
            advanced.wait()
        return out

    def _advance_caches(self, new: int) -> torch.cuda.Event | None:
        """Count the new tokens in; on a GPU beside what is queued next, up to the event."""
        positions = [layer.attn.kv_cache.cache_pos for layer in self._decoder.layers]
        device = positions[0].device
        if device.type != "cuda":
            torch._foreach_add_(positions, new)
            return None
        # Between kernels that overlap, or behind the last, it would cost 2 µs of every step.
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            torch._foreach_add_(positions, new)
        return side.record_event()

    def _unembed(self, h: Tensor) -> Tensor:
        norm, output = self._decoder.norm, self._decoder.output
        weight = _head_weight(output)
        if weight is None or not _is_norm(norm):
            return self._decoder.unembed(h)
        bias = getattr(output, "bias", None)
        return decode_linear(h, weight, bias, norm_weight=norm.scale, eps=norm.eps, fp32_out=True)


def _fp32_tables(module: nn.Module) -> tuple[Tensor, Tensor, bool]:
    cos, sin, interleaved = rope_tables(module)
    return cos.float(), sin.float(), interleaved


def _run_layer(
    layer: TransformerSelfAttentionLayer,
    h: Tensor,
    mask: Tensor | None,
    input_pos: Tensor | None,
    rope: tuple[Tensor, Tensor, bool] | None,
) -> Tensor:
    attn, mlp, cache, s = layer.attn, layer.mlp, layer.attn.kv_cache, h.shape[1]
    *tables, interleaved = rope or (True,)
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    q = decode_qkv(
        h,
        *(linear.weight for linear in projections),
        cache.k_cache,
        cache.v_cache,
        cache.cache_pos,
        biases=None if attn.q_proj.bias is None else tuple(p.bias for p in projections),
        norm_weight=layer.sa_norm.scale,
        eps=layer.sa_norm.eps,
        rope=tuple(tables) or None,
        input_pos=input_pos,
        interleaved=interleaved,
        head_norms=None if attn.q_norm is None else (attn.q_norm.scale, attn.k_norm.scale),
        head_eps=0.0 if attn.q_norm is None else attn.q_norm.eps,
        norm_before_rope=attn.norm_before_rope,
    )
    # cache_pos counts up from the first free slot, so its element s is what the length will be.
    length = cache.cache_pos[s : s + 1]
    out = attn.output_proj
    h = decode_attend(
        q,
        cache.k_cache,
        cache.v_cache,
        length,
        out.weight,
        out.bias,
        residual=h,
        mask=mask,
        window=attn.sliding_window,
    )
    gated = decode_gated(
        h,
        mlp.w1.weight,
        mlp.w3.weight,
        mlp.w1.bias,
        mlp.w3.bias,
        norm_weight=layer.mlp_norm.scale,
        eps=layer.mlp_norm.eps,
        activation=activation_name(mlp.activation),
    )
    return decode_linear(gated, mlp.w2.weight, mlp.w2.bias, residual=h)


def _layer_obstacle(layer: nn.Module) -> str | None:
    """Name and nature of the first part of a layer that has to be called as a module."""
    if not _is_one_of(layer, (TransformerSelfAttentionLayer, FusedTransformerSelfAttentionLayer)):
        return f"is a {type(layer).__name__} or carries hooks"
    attn, mlp = layer.attn, layer.mlp
    expected = {
        "sa_norm": (layer.sa_norm, (RMSNorm, FusedRMSNorm)),
        "mlp_norm": (layer.mlp_norm, (RMSNorm, FusedRMSNorm)),
        "sa_scale": (layer.sa_scale, (nn.Identity,)),
        "mlp_scale": (layer.mlp_scale, (nn.Identity,)),
        "attn": (attn, (FusedAttention,)),
        "mlp": (mlp, (FusedFeedForward,)),
    }
    for name, (module, classes) in expected.items():
        if not _is_one_of(module, classes):
            return f"{name} is a {type(module).__name__} or carries hooks"
    for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
        if not is_plain(getattr(attn, name), nn.Linear):
            return f"attn.{name} is a {type(getattr(attn, name)).__name__} or carries hooks"
    for name in ("w1", "w2", "w3"):
        if not is_plain(getattr(mlp, name), nn.Linear):
            return f"mlp.{name} is a {type(getattr(mlp, name)).__name__} or carries hooks"
    biases = [getattr(attn, name).bias is None for name in ("q_proj", "k_proj", "v_proj")]
    if len(set(biases)) > 1:
        return "attn has biases on some of q_proj, k_proj and v_proj only"
    if attn.q_norm is not None and not (_is_norm(attn.q_norm) and _is_norm(attn.k_norm)):
        return f"attn.q_norm is a {type(attn.q_norm).__name__} or carries hooks"
    if attn.pos_embeddings is not None and rope_tables(attn.pos_embeddings) is None:
        return f"attn.pos_embeddings is a {type(attn.pos_embeddings).__name__} or carries hooks"
    if activation_name(mlp.activation) is None:
        return f"mlp.activation is a {type(mlp.activation).__name__}"
    dtypes = {parameter.dtype for parameter in layer.parameters()}
    if len(dtypes) > 1:
        return f"has parameters of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if type(attn.kv_cache) is not KVCache or not attn.cache_enabled or not attn.is_causal:
        return "attn has no enabled KV cache, or is not causal"
    if attn.kv_cache.k_cache.dtype not in dtypes:
        return f"attn has a KV cache of another dtype, {attn.kv_cache.k_cache.dtype}"
    return _kernel_obstacle(attn, mlp) if attn.kv_cache.k_cache.is_cuda else None


def _kernel_obstacle(attn: FusedAttention, mlp: FusedFeedForward) -> str | None:
    """What the ops take on a CPU, and their kernels don't take on a GPU."""
    dtype = attn.kv_cache.k_cache.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return f"attn is {dtype}, and the decoding kernels are for float16 and bfloat16"
    if attn.head_dim % 16 or attn.head_dim > 256:
        return f"attn has heads of {attn.head_dim}, not a multiple of 16 up to 256"
    for linear in (attn.q_proj, attn.output_proj, mlp.w1, mlp.w2):
        if linear.in_features % 8:
            return f"has a projection of {linear.in_features} inputs, not a multiple of 8"
    return None


def _is_one_of(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    return any(is_plain(module, cls) for cls in classes)


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and _is_one_of(module, (RMSNorm, FusedRMSNorm))


def _head_weight(output: object) -> Tensor | None:
    """The weight of a head that is a plain linear layer, tied to the embedding or not."""
    if type(output) is TiedLinear:
        output = output.tied_module
        return output.weight if is_plain(output, nn.Embedding) else None
    return output.weight if is_plain(output, nn.Linear) else None
