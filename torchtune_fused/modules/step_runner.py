"""Decoding steps as replays of one captured CUDA graph."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from torchtune_fused.modules._plain import is_plain
from torchtune_fused.modules.captured import CapturedCall
from torchtune_fused.modules.decode_step import DecodeStep
from torchtune_fused.ops import decode_embed_
from torchtune_fused.ops.decode_linear import MAX_DECODE_TOKENS


class StepRunner:
    """Runs a decoder's steps of a few tokens through one CUDA graph, where that can be done.

    The graph reads the weights and caches where they lie. So before each replay the decoder is
    compared with what was captured, and captured anew if a module, a tensor or its memory is
    another one than then. A step costs the host about 0.1 ms, whatever the model.
    """

    def __init__(self) -> None:
        self._layout: _Layout | None = None
        self._step: Callable[..., Tensor] | None = None  # None: something is in the way
        self._calls: dict[tuple, CapturedCall] = {}  # by the shapes of the inputs
        self._length: int | None = None  # tokens in the caches, while only this object adds to them

    def __call__(
        self, decoder: TransformerDecoder, x: Tensor, mask: Tensor | None, input_pos: Tensor | None
    ) -> Tensor | None:
        """Run one step, from what the decoder starts with to what it ends with.

        Args:
            decoder (TransformerDecoder): A decoder, or a shard of one.
            x (Tensor): Tokens ``[b, s]`` or, for a decoder without embedding, the hidden state
                ``[b, s, embed_dim]``.
            mask (Tensor | None): bool ``[b or 1, s, cache length]``; None is causal by slot.
            input_pos (Tensor | None): Positions ``[s]`` or ``[b, s]``; None: each token's slot.

        Returns:
            Tensor | None: fp32 logits ``[b, s, vocab_size]`` or, without a head, the hidden state;
            the next step overwrites it. None if the step has to be made by calling the modules:
            nothing has been done then, and one warning has said what is in the way.

        Raises:
            ValueError: If the caches are full.
        """
        if not self._applies(decoder, x, mask):
            self._length = None
            return None
        if self._layout is None or not self._layout.still_holds():
            self._layout, self._length = _Layout(decoder), None
            self._step, self._calls = _step_of(decoder), {}
        if self._step is None:
            return None
        self._count(decoder, x.shape[1])
        key = tuple(None if t is None else (t.shape, t.dtype) for t in (x, mask, input_pos))
        call = self._calls.setdefault(key, CapturedCall(self._step))
        if decoder.tok_embeddings is not None:
            x = _embed(decoder.tok_embeddings, x, call.own_input(0))
        return call(x, mask, input_pos)

    def forget_length(self) -> None:
        """To be called when somebody else has filled or emptied the caches."""
        self._length = None

    def _applies(self, decoder: TransformerDecoder, x: Tensor, mask: object) -> bool:
        return (
            x.is_cuda
            and x.shape[0] * x.shape[1] <= MAX_DECODE_TOKENS
            and (mask is None or isinstance(mask, Tensor))
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.cuda.is_current_stream_capturing()
            and not decoder.output_hidden_states
            and not decoder.num_output_chunks
            and not decoder.skip_output_layer
            and decoder.caches_are_enabled()
        )

    def _count(self, decoder: TransformerDecoder, new: int) -> None:
        """Check that the caches have room, without asking the GPU at every step."""
        cache = decoder.layers[0].attn.kv_cache
        max_len = cache.k_cache.shape[2]
        if self._length is None or self._length + new > max_len:
            self._length = cache.size
        if self._length + new > max_len:
            raise ValueError(
                f"the KV cache is full: {self._length} of {max_len} slots are taken, {new} more "
                "are needed; set it up for a larger decoder_max_seq_len or reset it"
            )
        self._length += new

    # A copy or an unpickled decoder captures for itself.
    def __deepcopy__(self, memo: dict) -> "StepRunner":
        return StepRunner()

    def __reduce__(self) -> tuple:
        return (StepRunner, ())


def _embed(embedding: nn.Module, tokens: Tensor, out: Tensor | None) -> Tensor:
    """The embedding of tokens, in ``out`` if there is one and the embedding is just a table.

    A graph that began with the tokens would have them copied there first, and look them up in a
    kernel that no other overlaps.
    """
    if out is None or not is_plain(embedding, nn.Embedding) or embedding.max_norm is not None:
        return embedding(tokens)
    decode_embed_(out.flatten(0, 1), tokens.flatten().long(), embedding.weight)
    return out


def _step_of(decoder: TransformerDecoder) -> Callable[..., Tensor] | None:
    """What to capture; None, with a warning, if the modules have to be called."""
    if (obstacle := DecodeStep.obstacle(decoder)) is not None:
        warnings.warn(f"decoding calls the modules one by one, as {obstacle}", stacklevel=2)
        return None
    return DecodeStep(decoder)


class _Layout:
    """What a captured graph has taken for granted: the modules, their tensors and the memory."""

    def __init__(self, decoder: nn.Module) -> None:
        modules = list(decoder.modules())
        self._hooks = [
            hooks
            for module in modules
            if module is not decoder
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._children = [
            (module._modules, name, child)
            for module in modules
            for name, child in module._modules.items()
        ]
        self._tensors = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._flags = [
            (vars(module), vars(module)["cache_enabled"], module.training)
            for module in modules
            if "cache_enabled" in vars(module)
        ]

    def still_holds(self) -> bool:
        return (
            not any(self._hooks)
            and all(children.get(name) is child for children, name, child in self._children)
            and all(
                tensors.get(name) is tensor and tensor.data_ptr() == pointer
                for tensors, name, tensor, pointer in self._tensors
            )
            and all(
                state["cache_enabled"] == enabled and state["training"] == training
                for state, enabled, training in self._flags
            )
        )
