"""ShardTransformerDecoder: the part of a torchtune decoder that one shard owns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear
from torchtune.modules.attention_utils import _MaskType

from torchtune_fused.modules.decoder import CapturedSteps, HeadForLoss
from torchtune_fused.shard.checks import (
    check_cache,
    check_mask,
    check_positions,
    check_tokens,
)
from torchtune_fused.shard.shard import Shard

if TYPE_CHECKING:
    from torchtune_fused.models import ModelConfig


class LayerRange(nn.ModuleList):
    """The layers of one shard: indexed from 0, registered by their numbers in the whole model.

    So each key of a shard's state dict is the whole model's key.

    Args:
        layers (Iterable[nn.Module]): The layers.
        first (int): Number of the first of them in the whole model.
    """

    def __init__(self, layers: Iterable[nn.Module], first: int):
        super().__init__()
        self.first = first
        for number, layer in enumerate(layers, first):
            self.add_module(str(number), layer)

    def _get_abs_string_index(self, idx: int) -> str:
        return str(self.first + int(super()._get_abs_string_index(idx)))

    def __getitem__(self, idx: int | slice) -> nn.Module | nn.ModuleList:
        if isinstance(idx, slice):
            return nn.ModuleList(list(self)[idx])
        return super().__getitem__(idx)

    def _refuse(self, *_: object) -> None:
        raise TypeError("a shard's range of layers is fixed: build a decoder for another Shard")

    append = insert = extend = pop = __delitem__ = __iadd__ = _refuse


class ShardTransformerDecoder(HeadForLoss, CapturedSteps):
    """A range of a decoder's layers, with the embedding on the first and the head on the last.

    The shard that is the whole model is a :class:`torchtune.modules.TransformerDecoder` in all
    respects. Chained shards give the whole model's result bit for bit. State-dict keys carry the
    layers' numbers in the whole model, so the state dicts of all shards together are the whole
    model's, but for one key: where the embedding is tied, a last shard that is not also the first
    holds the head as its own copy, ``output.weight``, equal to ``tok_embeddings.weight``.

    Args:
        shard (Shard): The layers owned.
        tok_embeddings (nn.Embedding | None): Token embedding; kept by the first shard only.
        layers (nn.Module | Sequence[nn.Module | None]): The shard's own layers; or as many entries
            as the model has layers, of which only the owned are kept; or one layer, copied for
            each owned layer.
        max_seq_len (int): Longest sequence, in tokens.
        num_heads (int): Query heads.
        head_dim (int): Width of one head.
        norm (nn.Module | None): Norm before the head; kept by the last shard only.
        output (nn.Linear | Callable | None): The head; kept by the last shard only.
        num_layers (int | None): Layers of the whole model, if neither the shard nor ``layers`` say.
        output_hidden_states (list[int] | None): Numbers, in the whole model, of the layers whose
            inputs ``forward`` also returns.

    Raises:
        ValueError: If the layers do not fit the shard, or a part that it must own is missing.
    """

    def __init__(
        self,
        *,
        shard: Shard,
        tok_embeddings: nn.Embedding | None,
        layers: nn.Module | Sequence[nn.Module | None],
        max_seq_len: int,
        num_heads: int,
        head_dim: int,
        norm: nn.Module | None,
        output: nn.Linear | Callable[[Tensor], Tensor] | None,
        num_layers: int | None = None,
        output_hidden_states: list[int] | None = None,
    ):
        shard, owned = _own_layers(shard, layers, num_layers)
        first, last = shard.is_first_layer(), shard.is_last_layer()
        if first and tok_embeddings is None:
            raise ValueError(f"{shard} starts the model and needs tok_embeddings")
        if last and (norm is None or output is None):
            raise ValueError(f"{shard} ends the model and needs norm and output")
        if last and not first and isinstance(output, TiedLinear):
            raise ValueError(
                f"{shard} does not hold the embedding that output is tied to: give it an nn.Linear "
                "with a copy of the embedding's weight"
            )
        super().__init__(
            tok_embeddings=tok_embeddings if first else None,
            layers=LayerRange(owned, shard.start_layer),
            max_seq_len=max_seq_len,
            num_heads=num_heads,
            head_dim=head_dim,
            norm=norm if last else None,
            output=output if last else None,
            output_hidden_states=output_hidden_states,
        )
        self.shard = shard
        self.config: ModelConfig | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        shard: Shard | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        patch: bool = True,
        max_seq_len: int | None = None,
    ) -> ShardTransformerDecoder:
        """Load a model, or one shard of it, reading no other shard's weights.

        On the CPU, weights that are used as stored are not copied but mapped from their file, and
        copied page by page where they are written to. The file may be replaced or deleted
        meanwhile, but must not be truncated.

        Args:
            path_or_repo_id (str | Path): A folder with a config and safetensors or Meta ``.pth``
                files; or a repository of the Hugging Face Hub, of which only the files that hold
                this shard's tensors are fetched.
            shard (Shard | None): The layers to load; None for the whole model.
            dtype (torch.dtype | None): Dtype of the weights; None for the checkpoint's.
            device (torch.device | str | None): Where to put them; None for the default device.
            patch (bool): Whether to swap in the fused modules (``patch_model``).
            max_seq_len (int | None): Longest sequence to run, in tokens; None for the config's.

        Returns:
            ShardTransformerDecoder: The model, in evaluation mode.

        Raises:
            FileNotFoundError: If there is no such folder, or no checkpoint in it.
            ConfigError: If its config is corrupt or not supported.
            CheckpointError: If its weights are corrupt, missing, unexpected or misshapen.
            ValueError: If the shard is not one of this model.
        """
        # Models and checkpoints are built out of this class, so they can't be imported above it.
        from torchtune_fused.checkpoint.pretrained import load_pretrained

        return load_pretrained(
            path_or_repo_id,
            shard,
            dtype=dtype,
            device=device,
            patch=patch,
            max_seq_len=max_seq_len,
        )

    def save_pretrained(self, folder: str | Path, *, max_shard_size: str = "5GB") -> None:
        """Write the whole model to a folder that transformers, and we, can load.

        Weights go to safetensors files under their names in transformers; the config and the
        tokenizer's files come along. Files are replaced only once all are written.

        Args:
            folder (str | Path): Where to; made if it is not there.
            max_shard_size (str): Largest size of one file of weights.

        Raises:
            ValueError: If this shard is only a part of a model, or it was not built from a config.
        """
        from torchtune_fused.checkpoint.pretrained import save_pretrained

        save_pretrained(self, Path(folder), max_shard_size)

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        mask: _MaskType | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """Run the shard.

        Args:
            tokens (Tensor | None): Token ids ``[b, s]``, int64 or int32; for the first shard.
            mask (_MaskType | None): Bool ``[b or 1, s, s]``, or ``[b or 1, s, cache length]`` with
                KV caches (then it is required), True where a token attends; or a ``BlockMask``.
                None means causal.
            input_pos (Tensor | None): Position of each token, ``[s]`` or ``[b, s]``; required with
                KV caches. None means 0, 1, 2, ...
            hidden_state (Tensor | None): Output of the shard before, ``[b, s, embed_dim]``; for all
                shards but the first.

        Returns:
            Tensor | list[Tensor]: fp32 logits ``[b, s, vocab_size]`` from the last shard (a list of
            chunks, in the weights' dtype, after ``set_num_output_chunks``), the hidden state
            ``[b, s, embed_dim]`` from the others. With ``output_hidden_states``, a list of the
            hidden states asked for that lie in this shard, and that output at its end.

        Raises:
            ValueError: If an input is missing, misshapen or out of range, or a cache is too small.
        """
        self._check_inputs(tokens, mask, input_pos, hidden_state)
        if mask is not None and input_pos is not None:
            output = self.step(hidden_state if tokens is None else tokens, mask, input_pos)
            if output is not None:
                return output.clone()  # the next step overwrites it
        h, hidden = self._run_layers(tokens, mask, input_pos, hidden_state)
        output = self.unembed(h) if self.shard.is_last_layer() else h
        return [*hidden, output] if hidden else output

    def forward_hidden(
        self,
        tokens: Tensor | None = None,
        *,
        mask: _MaskType | None = None,
        input_pos: Tensor | None = None,
        hidden_state: Tensor | None = None,
    ) -> Tensor:
        """Like :meth:`forward`, without the last norm and the head.

        ``unembed`` of the positions whose logits are needed gives those at less cost.

        Returns:
            Tensor: The hidden state after this shard's last layer, ``[b, s, embed_dim]``.

        Raises:
            ValueError: As :meth:`forward`.
        """
        self._check_inputs(tokens, mask, input_pos, hidden_state)
        return self._run_layers(tokens, mask, input_pos, hidden_state)[0]

    def unembed(self, h: Tensor) -> Tensor | list[Tensor]:
        """The last norm and the head.

        Args:
            h (Tensor): Hidden state after the model's last layer, ``[b, s, embed_dim]``.

        Returns:
            Tensor | list[Tensor]: fp32 logits ``[b, s, vocab_size]``, or a list of chunks of them,
            in the weights' dtype, after ``set_num_output_chunks``.

        Raises:
            ValueError: If this is not the last shard.
        """
        if not self.shard.is_last_layer():
            raise ValueError(f"{self.shard} has no head: only the last shard projects to logits")
        return super().unembed(h)

    def _run_layers(
        self,
        tokens: Tensor | None,
        mask: _MaskType | None,
        input_pos: Tensor | None,
        hidden_state: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        if self._runner is not None:
            self._runner.forget_length()
        h = hidden_state if tokens is None else self.tok_embeddings(tokens)
        hidden = []
        for number, layer in zip(self.shard.layers, self.layers, strict=True):
            if number in self.output_hidden_states:
                hidden.append(h)
            h = layer(h, mask=mask, input_pos=input_pos)
        return h, hidden

    def _check_inputs(
        self,
        tokens: Tensor | None,
        mask: _MaskType | None,
        input_pos: Tensor | None,
        hidden_state: Tensor | None,
    ) -> None:
        """Turn what would fail deep inside a layer, or go wrong silently, into one clear error."""
        if self.shard.is_first_layer():
            if tokens is None or hidden_state is not None:
                raise ValueError(f"{self.shard} starts the model: give it tokens, no hidden_state")
            check_tokens(tokens, self.tok_embeddings.num_embeddings)
            batch, seq_len = tokens.shape
        else:
            if hidden_state is None or tokens is not None:
                raise ValueError(
                    f"{self.shard} does not start the model: give it hidden_state, no tokens"
                )
            if hidden_state.ndim != 3:
                raise ValueError(
                    f"hidden_state has shape {list(hidden_state.shape)}, expected [b, s, embed_dim]"
                )
            batch, seq_len, _ = hidden_state.shape
        self._validate_inputs(seq_len, mask=mask, input_pos=input_pos)
        keys = seq_len
        if self.caches_are_enabled():
            cache = self.layers[0].attn.kv_cache
            check_cache(cache, batch, seq_len)
            keys = cache.k_cache.shape[2]
        if isinstance(mask, Tensor):
            check_mask(mask, batch, seq_len, keys)
        if input_pos is not None:
            check_positions(input_pos, batch, seq_len, self.max_seq_len)


def _own_layers(
    shard: Shard, layers: nn.Module | Sequence[nn.Module | None], num_layers: int | None
) -> tuple[Shard, list[nn.Module]]:
    """The shard with its number of layers filled in, and the layers that it owns."""
    count = shard.get_layer_count()
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        n_layers = num_layers or shard.n_layers
        if n_layers is None:
            raise ValueError("a single layer was given to copy: num_layers must say of how many")
        return shard.of(n_layers), [deepcopy(layers) for _ in range(count)]
    n_layers = num_layers or shard.n_layers or len(layers)
    shard = shard.of(n_layers)
    if len(layers) == n_layers:
        owned = [layers[number] for number in shard.layers]
    elif len(layers) == count:
        owned = list(layers)
    else:
        raise ValueError(
            f"{len(layers)} layers were given for {shard}: expected its own {count}, or all "
            f"{n_layers} of the model"
        )
    if None in owned:
        missing = shard.start_layer + owned.index(None)
        raise ValueError(f"{shard} owns layer {missing}, but None was given for it")
    return shard, owned
