"""Shards: contiguous ranges of a model's layers, each a decoder of its own."""

from torchtune_fused.shard.decoder import ShardTransformerDecoder
from torchtune_fused.shard.shard import Shard, plan_shards, validate_shards

__all__ = ["Shard", "ShardTransformerDecoder", "plan_shards", "validate_shards"]
