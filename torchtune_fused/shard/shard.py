"""Which layers of a model one shard owns, and how to cut a model into such shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchtune_fused.models import ModelConfig


@dataclass(frozen=True)
class Shard:
    """A contiguous range of a model's layers.

    Args:
        model_id (str): Name of the model; for people and logs.
        start_layer (int): First layer owned, counted from 0 in the whole model.
        end_layer (int): Last layer owned, inclusive.
        n_layers (int | None): Layers of the whole model. May be left out where a
            :class:`~torchtune_fused.models.ModelConfig` is at hand to fill it in.

    Raises:
        ValueError: If the range is empty, negative, or reaches past ``n_layers``.
    """

    model_id: str
    start_layer: int
    end_layer: int
    n_layers: int | None = None

    def __post_init__(self):
        if not 0 <= self.start_layer <= self.end_layer:
            raise ValueError(
                f"{self}: expected 0 <= start_layer <= end_layer (both ends are inclusive)"
            )
        if self.n_layers is not None and self.end_layer >= self.n_layers:
            raise ValueError(
                f"{self}: end_layer must be below n_layers, the last layer being "
                f"{self.n_layers - 1}"
            )

    @classmethod
    def whole(cls, model_id: str, n_layers: int) -> Shard:
        """The shard that is the whole model."""
        return cls(model_id, 0, n_layers - 1, n_layers)

    def of(self, n_layers: int) -> Shard:
        """This shard, known to belong to a model of ``n_layers`` layers.

        Raises:
            ValueError: If it says that it belongs to another number, or reaches past the model.
        """
        if self.n_layers not in (None, n_layers):
            raise ValueError(f"{self}: n_layers is {self.n_layers}, but the model has {n_layers}")
        return replace(self, n_layers=n_layers)

    @property
    def layers(self) -> range:
        """Numbers of the owned layers in the whole model."""
        return range(self.start_layer, self.end_layer + 1)

    def is_first_layer(self) -> bool:
        """Whether this shard starts the model, and so embeds the tokens."""
        return self.start_layer == 0

    def is_last_layer(self) -> bool:
        """Whether this shard ends the model, and so normalises and projects to logits.

        Raises:
            ValueError: If ``n_layers`` is not known.
        """
        if self.n_layers is None:
            raise ValueError(f"{self}: n_layers is needed to know whether this is the last shard")
        return self.end_layer == self.n_layers - 1

    def get_layer_count(self) -> int:
        """How many layers this shard owns."""
        return len(self.layers)


def plan_shards(config: ModelConfig, n: int) -> list[Shard]:
    """Cut a model into ``n`` contiguous shards so that the largest is as small as it can be.

    The embedding counts for the first shard, the final norm and the head for the last. A tied head
    is the embedding itself when one shard holds both ends, and a second copy of it otherwise.

    Args:
        config (ModelConfig): The model to cut.
        n (int): How many shards; each gets at least one layer.

    Returns:
        list[Shard]: The shards in the order of their layers.

    Raises:
        ValueError: If ``n`` is not between 1 and the number of layers.
    """
    if not 1 <= n <= config.num_layers:
        raise ValueError(
            f"cannot cut a model of {config.num_layers} layers into {n} shards: "
            f"choose between 1 and {config.num_layers}"
        )
    # All weights of a model have one dtype, so parameters weigh as bytes do.
    embedding = config.vocab_size * config.embed_dim
    head = 0 if config.tie_word_embeddings and n == 1 else embedding
    sizes = [config.layer_parameters()] * config.num_layers
    sizes[0] += embedding
    sizes[-1] += head + config.embed_dim
    starts = _balanced_starts(sizes, n)
    return [
        Shard(config.model_id, start, end - 1, config.num_layers)
        for start, end in zip(starts, [*starts[1:], config.num_layers], strict=True)
    ]


def validate_shards(shards: Sequence[Shard]) -> None:
    """Check that the shards, in this order, make up one whole model: no gap, no overlap.

    Raises:
        ValueError: Naming the first two shards that do not fit, or the end that is missing.
    """
    if not shards:
        raise ValueError("no shards were given: a model needs at least one")
    first, last = shards[0], shards[-1]
    if not first.is_first_layer():
        raise ValueError(f"{first} comes first but does not start at layer 0")
    for shard, following in pairwise(shards):
        if (shard.model_id, shard.n_layers) != (following.model_id, following.n_layers):
            raise ValueError(f"{shard} and {following} belong to different models")
        if following.start_layer <= shard.end_layer:
            raise ValueError(f"{shard} and {following} overlap or are out of order")
        if following.start_layer > shard.end_layer + 1:
            raise ValueError(f"no shard owns the layers between {shard} and {following}")
    if not last.is_last_layer():
        raise ValueError(f"{last} comes last but does not reach layer {last.n_layers - 1}")


def _balanced_starts(sizes: list[int], n: int) -> list[int]:
    """First items of the ``n`` contiguous parts whose largest sum is smallest.

    Among the cuts with that largest sum, prefers even ones, by the sum of squares.
    """
    total = len(sizes)
    prefix = [0]
    for size in sizes:
        prefix.append(prefix[-1] + size)

    @cache
    def best(start: int, parts: int) -> tuple[int, int, tuple[int, ...]]:
        if parts == 1:
            size = prefix[total] - prefix[start]
            return size, size**2, (start,)
        candidates = []
        for cut in range(start + 1, total - parts + 2):
            size = prefix[cut] - prefix[start]
            largest, squares, starts = best(cut, parts - 1)
            candidates.append((max(size, largest), size**2 + squares, (start, *starts)))
        return min(candidates)

    return list(best(0, n)[2])
