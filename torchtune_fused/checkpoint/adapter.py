"""WeightAdapter: the names and layouts of a checkpoint's tensors, ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from torchtune_fused.models.config import FAMILIES, ModelConfig
from torchtune_fused.shard.shard import Shard

# Meta's own checkpoints of Llama: the same tensors by other names, q and k as torchtune has them.
META_WEIGHTS = {
    "tok_embeddings.weight": "tok_embeddings.weight",
    "norm.weight": "norm.scale",
    "output.weight": "output.weight",
    "layers.{layer}.attention_norm.weight": "layers.{layer}.sa_norm.scale",
    "layers.{layer}.attention.wq.weight": "layers.{layer}.attn.q_proj.weight",
    "layers.{layer}.attention.wk.weight": "layers.{layer}.attn.k_proj.weight",
    "layers.{layer}.attention.wv.weight": "layers.{layer}.attn.v_proj.weight",
    "layers.{layer}.attention.wo.weight": "layers.{layer}.attn.output_proj.weight",
    "layers.{layer}.ffn_norm.weight": "layers.{layer}.mlp_norm.scale",
    "layers.{layer}.feed_forward.w1.weight": "layers.{layer}.mlp.w1.weight",
    "layers.{layer}.feed_forward.w2.weight": "layers.{layer}.mlp.w2.weight",
    "layers.{layer}.feed_forward.w3.weight": "layers.{layer}.mlp.w3.weight",
}

_LAYER = re.compile(r"(?<=layers\.)(0|[1-9]\d*)(?=\.)")
_ROTATED = re.compile(r"\.attn\.[qk]_proj\.(weight|bias)$")


class WeightAdapter:
    """Translates between the tensors of a checkpoint and those of a torchtune decoder.

    Two declarations decide everything: a table of names, whose inverse is derived, and whether the
    rows of the q and k projections are stored in halves where the decoder rotates pairs.

    Args:
        weights (Mapping[str, str]): Name in the checkpoint → name in torchtune, with ``{layer}``
            for the number of the layer.
        rope_head_dim (int | None): Width of a head, if q and k are to be permuted; None if not.
    """

    def __init__(self, weights: Mapping[str, str], rope_head_dim: int | None):
        self._ours = dict(weights)
        self._theirs = {ours: theirs for theirs, ours in weights.items()}
        self._rope_head_dim = rope_head_dim

    @classmethod
    def for_hf(cls, config: ModelConfig) -> WeightAdapter:
        """For a checkpoint in the layout of transformers."""
        family = FAMILIES[config.family]
        return cls(family.weights, config.head_dim if family.interleaved_rope else None)

    @classmethod
    def for_meta(cls) -> WeightAdapter:
        """For a checkpoint in the layout of Meta's ``consolidated.*.pth``."""
        return cls(META_WEIGHTS, None)

    def our_name(self, theirs: str) -> str | None:
        """Name in torchtune of a checkpoint's tensor; None if the family has no such tensor."""
        return _rename(theirs, self._ours)

    def their_name(self, ours: str) -> str | None:
        """Name in the checkpoint of a decoder's tensor; None if the family has no such tensor."""
        return _rename(ours, self._theirs)

    def to_ours(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A checkpoint's tensor as the decoder wants it.

        Args:
            name (str): Its name in torchtune.
            tensor (torch.Tensor): The tensor as stored.

        Returns:
            torch.Tensor: The same shape and dtype; ``tensor`` itself where nothing changes.
        """
        return self._swap_rows(name, tensor, halves_to_pairs=True)

    def to_theirs(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_ours`, bit for bit."""
        return self._swap_rows(name, tensor, halves_to_pairs=False)

    def _swap_rows(self, name: str, tensor: torch.Tensor, *, halves_to_pairs: bool) -> torch.Tensor:
        if self._rope_head_dim is None or not _ROTATED.search(name):
            return tensor
        # Of each head's rows, i and i + d/2 become neighbours 2i and 2i + 1, or the other way.
        half = self._rope_head_dim // 2
        split = (2, half) if halves_to_pairs else (half, 2)
        return tensor.unflatten(0, (-1, *split)).transpose(1, 2).flatten(0, 2)


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    layer = _LAYER.search(name)
    if layer is None:
        return None if "{" in name else table.get(name)
    pattern = table.get(name[: layer.start()] + "{layer}" + name[layer.end() :])
    return pattern and pattern.format(layer=layer.group())


def owns(shard: Shard, config: ModelConfig, name: str) -> bool:
    """Whether a tensor, by its name in torchtune, is of use to a shard.

    The last shard of a model with a tied head needs the embedding too, to make its head of.
    """
    layer = _LAYER.search(name)
    if layer is not None:
        return int(layer.group()) in shard.layers
    if name.startswith("tok_embeddings."):
        return shard.is_first_layer() or (config.tie_word_embeddings and shard.is_last_layer())
    return shard.is_last_layer()
