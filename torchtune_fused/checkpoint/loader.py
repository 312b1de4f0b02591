"""load_weights: the tensors that a decoder owns, from a checkpoint to its device and dtype."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from torchtune_fused.checkpoint.adapter import WeightAdapter, owns
from torchtune_fused.checkpoint.files import (
    Checkpoint,
    CheckpointError,
    MetaCheckpoint,
    open_checkpoint,
)
from torchtune_fused.models.config import ModelConfig, load_model_config
from torchtune_fused.shard.shard import Shard

_EMBEDDING = "tok_embeddings.weight"
_HEAD = "output.weight"
# Buffers that old versions of transformers saved among the weights.
_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_PROBLEMS_SHOWN = 8


def load_model_weights_torchtune(
    cache_dir: str | Path,
    shard: Shard,
    model: TransformerDecoder,
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
) -> None:
    """Load the weights of a shard from a folder into an existing decoder, in place.

    Args:
        cache_dir (str | Path): Folder with config.json and safetensors, or with params.json and
            Meta's ``.pth`` files.
        shard (Shard): The layers that ``model`` has.
        model (TransformerDecoder): A :class:`~torchtune_fused.shard.ShardTransformerDecoder`, or a
            stock decoder if the shard is the whole model. Its weights keep their dtype and device;
            those on the meta device get the checkpoint's dtype on the default device.
        num_heads (int): Query heads of ``model``.
        num_kv_heads (int): Key and value heads of ``model``.
        dim (int): Width of the hidden state of ``model``.
        head_dim (int | None): Width of one head; None for ``dim // num_heads``.

    Raises:
        FileNotFoundError: If the folder has no config, or no weights.
        CheckpointError: If a file is corrupt, a tensor missing, unexpected or misshapen; nothing
            has been loaded then.
        ValueError: If the shard or the numbers do not fit the folder's config, or the shard is not
            the model's.
    """
    folder = Path(cache_dir)
    config = load_model_config(folder)
    shard = shard.of(config.num_layers)
    given = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "embed_dim": dim,
        "head_dim": head_dim or dim // num_heads,
    }
    for name, value in given.items():
        if config[name] != value:
            raise ValueError(f"{name} is {value}, but {folder} holds a model with {config[name]}")
    own = getattr(model, "shard", Shard.whole(shard.model_id, config.num_layers))
    if own.layers != shard.layers:
        raise ValueError(f"the model holds {own}, not {shard}")
    load_weights(model, config, folder, shard)


def load_weights(
    model: TransformerDecoder,
    config: ModelConfig,
    folder: Path,
    shard: Shard,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> None:
    """Read each tensor that a decoder owns, and no other, straight to its device and dtype.

    Names and shapes are checked, all of them, before the first is read. Weights on the meta device
    are replaced; others are overwritten in place.

    Args:
        model (TransformerDecoder): The decoder.
        config (ModelConfig): The checkpoint's config.
        folder (Path): The folder that holds the checkpoint.
        shard (Shard): The layers that ``model`` has.
        dtype (torch.dtype | None): Dtype of weights on the meta device; None for the checkpoint's.
        device (torch.device | None): Device for weights on the meta device; None for the default.

    Raises:
        FileNotFoundError: If the folder holds no weights.
        CheckpointError: If a file is corrupt, or tensors are missing, unexpected or misshapen.
    """
    checkpoint = open_checkpoint(folder)
    is_meta = isinstance(checkpoint, MetaCheckpoint)
    adapter = WeightAdapter.for_meta() if is_meta else WeightAdapter.for_hf(config)
    targets = model.state_dict()
    sources, stored_dtype = _match(checkpoint, adapter, config, shard, targets)
    dtype = dtype or config.dtype or stored_dtype
    device = device or torch.get_default_device()

    fresh: dict[str, torch.Tensor] = {}
    finite: dict[str, torch.Tensor] = {}
    # A tensor that is copied takes its memory twice for a moment. The largest go first, when there
    # is still room for that below what the whole will take.
    order = sorted(sources, key=lambda name: targets[name].numel(), reverse=True)
    for name in tqdm(order, desc=f"loading {folder.name}", unit="tensor", disable=None):
        stored = checkpoint.read(sources[name])
        ours = adapter.to_ours(name, stored)
        if targets[name].is_meta:
            # The stored tensor itself, where nothing changes.
            weight = fresh[name] = ours.to(device=device, dtype=dtype)
        else:
            weight = targets[name].copy_(ours)
        # Of the two the narrower: there is less of it, and narrowing is what can overflow.
        finite[name] = _is_finite(min(weight, stored, key=lambda tensor: tensor.itemsize))
        if weight is not stored:
            checkpoint.release(sources[name])
    model.load_state_dict(fresh, strict=False, assign=True)
    _warn_of_non_finite(folder, finite)


def _match(
    checkpoint: Checkpoint,
    adapter: WeightAdapter,
    config: ModelConfig,
    shard: Shard,
    targets: Mapping[str, torch.Tensor],
) -> tuple[dict[str, str], torch.dtype]:
    """Find the stored tensor for each of the decoder's.

    Returns:
        tuple[dict[str, str], torch.dtype]: Name in torchtune → name in the checkpoint; and the
        dtype that most of those weights are stored in.

    Raises:
        CheckpointError: Naming every tensor that is missing, unexpected or misshapen.
    """
    present = checkpoint.names
    sources = {name: adapter.their_name(name) or name for name in targets}
    if config.tie_word_embeddings and _HEAD in targets:
        sources[_HEAD] = adapter.their_name(_EMBEDDING)
    unexpected = _unexpected(present, adapter, config, shard, targets)
    problems = [f"{name} is unexpected" for name in unexpected]
    stored = checkpoint.describe(set(sources.values()) & present)
    for name, source in sources.items():
        expected = tuple(targets[name].shape)
        if source not in stored:
            problems.append(f"{source} is missing")
        elif stored[source].shape != expected:
            problems.append(
                f"{source} has shape {list(stored[source].shape)}, expected {list(expected)}"
            )
    if not problems:
        problems = _contradictory_head(checkpoint, adapter, config, shard)
    if problems:
        shown = "; ".join(problems[:_PROBLEMS_SHOWN])
        more = len(problems) - _PROBLEMS_SHOWN
        raise CheckpointError(
            f"{checkpoint.folder}: the tensors do not fit the config: {shown}"
            + (f"; and {more} more" if more > 0 else "")
        )
    sizes: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    return sources, sizes.most_common(1)[0][0]


def _unexpected(
    present: Iterable[str],
    adapter: WeightAdapter,
    config: ModelConfig,
    shard: Shard,
    targets: Mapping[str, torch.Tensor],
) -> list[str]:
    """Tensors that no part of the model has; what other shards own is none of our business."""
    whole = Shard.whole(shard.model_id, config.num_layers)
    # Where the two are tied, one of them is enough, and the other may be stored none the less.
    optional = {_HEAD, _EMBEDDING} if config.tie_word_embeddings else set()

    def is_unexpected(source: str) -> bool:
        name = adapter.our_name(source)
        if name is None or not owns(whole, config, name):
            return not _NOT_WEIGHTS.search(source)
        return owns(shard, config, name) and name not in targets and name not in optional

    return sorted(filter(is_unexpected, present))


def _contradictory_head(
    checkpoint: Checkpoint, adapter: WeightAdapter, config: ModelConfig, shard: Shard
) -> list[str]:
    """A head stored beside the embedding that it is said to be, and yet different from it."""
    head, embedding = adapter.their_name(_HEAD), adapter.their_name(_EMBEDDING)
    if not config.tie_word_embeddings or not shard.is_last_layer() or head not in checkpoint.names:
        return []
    a, b = checkpoint.read(head), checkpoint.read(embedding)
    same = a.dtype == b.dtype and torch.equal(a, b)
    checkpoint.release(head)
    if same:
        return []
    return [f"{head} differs from {embedding}, though tie_word_embeddings is true"]


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    # One pass and no temporary; NaN and infinity both reach the extremes. No wait on a GPU.
    low, high = tensor.aminmax()
    return low.isfinite() & high.isfinite()


def _warn_of_non_finite(folder: Path, finite: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, ok in finite.items() if not ok]
    if bad:
        shown = ", ".join(bad[:_PROBLEMS_SHOWN]) + (", ..." if len(bad) > _PROBLEMS_SHOWN else "")
        warnings.warn(f"{folder}: NaN or infinite values in {shown}", stacklevel=2)
