"""One model over several processes: each rank of torch.distributed holds one shard of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchtune_fused.shard.decoder import ShardTransformerDecoder
from torchtune_fused.shard.shard import plan_shards, validate_shards

T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank failed, and this one can't go on without it."""


class Pipeline:
    """The ranks of a process group as the stages of one model, for inference.

    Rank 0 embeds the tokens, hidden states travel from rank to rank, and the last rank has the
    logits. Every rank makes the same calls with the same tokens, so shapes are known everywhere
    and only hidden states are sent. :func:`~torchtune_fused.generation.generate` takes a pipeline
    in the place of a model, and gives every rank the same tokens.

    A rank that dies closes its connections, so that the calls of its neighbours fail: at once with
    gloo; with NCCL when the launcher (``tune run``, torchrun) ends the job.

    Args:
        decoder (ShardTransformerDecoder): This rank's shard. In the order of ranks, the shards
            must make up the whole model.
        group (dist.ProcessGroup | None): The ranks that take part; None means all.

    Attributes:
        decoder (ShardTransformerDecoder): This rank's shard.
        max_seq_len (int): The shortest of the ranks' ``max_seq_len``.
        vocab_size (int): Number of rows of the embedding.

    Raises:
        RuntimeError: If torch.distributed is not initialised.
        ValueError: If the shards do not make up one model, or differ in dtype.
    """

    def __init__(
        self, decoder: ShardTransformerDecoder, group: dist.ProcessGroup | None = None
    ) -> None:
        _require_initialized()
        self.decoder = decoder
        self._group = group
        self._rank = dist.get_rank(group)
        weight = next(decoder.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        first = decoder.shard.is_first_layer()
        stages = _gather(
            {
                "shard": decoder.shard,
                "dtype": self._dtype,
                "max_seq_len": decoder.max_seq_len,
                "embedding": tuple(decoder.tok_embeddings.weight.shape) if first else None,
            },
            group,
        )
        validate_shards([stage["shard"] for stage in stages])
        for rank, stage in enumerate(stages):
            if stage["dtype"] != stages[0]["dtype"]:
                raise ValueError(
                    f"rank {rank} holds its shard in {stage['dtype']}, "
                    f"rank 0 in {stages[0]['dtype']}: all shards must have one dtype"
                )
        self.max_seq_len = min(stage["max_seq_len"] for stage in stages)
        self.vocab_size, self._embed_dim = stages[0]["embedding"]

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        patch: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> Pipeline:
        """Cut a checkpoint into one shard a rank, and load only this rank's.

        Args:
            path_or_repo_id (str | Path): As for :meth:`ShardTransformerDecoder.from_pretrained`.
            dtype (torch.dtype | None): Dtype of the weights; None keeps the checkpoint's.
            device (torch.device | str | None): This rank's device; None means the default one.
            patch (bool): Whether to put in the fused modules.
            group (dist.ProcessGroup | None): The ranks that take part; None means all.

        Returns:
            Pipeline: the model, its stages on all ranks of the group.

        Raises:
            RuntimeError: If torch.distributed is not initialised.
            RankError: If another rank failed to load its shard.
            ValueError: If the model has fewer layers than there are ranks. A checkpoint's own
                errors are those of :meth:`ShardTransformerDecoder.from_pretrained`.
        """
        # Models and checkpoints are built out of shards, so they can't be imported above them.
        from torchtune_fused.checkpoint.hub import fetch_side_files
        from torchtune_fused.models import load_model_config

        _require_initialized()

        def load() -> ShardTransformerDecoder:
            config = load_model_config(fetch_side_files(path_or_repo_id))
            shard = plan_shards(config, dist.get_world_size(group))[dist.get_rank(group)]
            return ShardTransformerDecoder.from_pretrained(
                path_or_repo_id, shard, dtype=dtype, device=device, patch=patch
            )

        return cls(_all_or_none(load, "load its shard", group), group)

    @property
    def is_last(self) -> bool:
        """Whether this rank has the logits."""
        return self.decoder.shard.is_last_layer()

    def __call__(
        self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor | None:
        """Run the whole model; arguments as for torchtune's TransformerDecoder, equal on all ranks.

        Args:
            tokens (Tensor): int64 ``[b, s]``.
            mask (Tensor | None): bool ``[b, s, s]``, or ``[b, s, cache_len]`` with KV caches.
            input_pos (Tensor | None): int64 ``[b, s]``.

        Returns:
            Tensor | None: float logits ``[b, s, vocab]`` on the last rank, None on the others.
        """
        return self._run(self.decoder.forward, tokens, mask, input_pos)

    def forward_hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None
    ) -> Tensor | None:
        """Run all layers, without the final norm and the projection to logits.

        Returns:
            Tensor | None: hidden state ``[b, s, d]`` on the last rank, None on the others.
        """
        return self._run(self.decoder.forward_hidden, tokens, mask, input_pos)

    def step(self, tokens: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor | None:
        """One decoding step, each stage in its captured form where it can be.

        Args:
            tokens (Tensor): int64 ``[b, s]``, equal on all ranks.
            mask (Tensor): bool ``[b or 1, s, cache_len]``.
            input_pos (Tensor): int64 ``[s]`` or ``[b, s]``.

        Returns:
            Tensor | None: float logits ``[b, s, vocab]`` on the last rank, which the next step may
            overwrite; None on the others.
        """

        def run_stage(tokens: Tensor | None = None, **inputs: Tensor) -> Tensor:
            x = inputs["hidden_state"] if tokens is None else tokens
            out = self.decoder.step(x, mask, input_pos)
            if out is not None:
                return out
            h = self.decoder.forward_hidden(tokens, **inputs)
            return self.unembed(h) if self.is_last else h

        return self._run(run_stage, tokens, mask, input_pos)

    def _run(
        self,
        forward: Callable[..., Tensor],
        tokens: Tensor,
        mask: Tensor | None,
        input_pos: Tensor | None,
    ) -> Tensor | None:
        """Receive from the rank before, run this rank's shard, and send to the next one."""
        if self._rank == 0:
            h = forward(tokens, mask=mask, input_pos=input_pos)
        else:
            h = torch.empty(*tokens.shape, self._embed_dim, dtype=self._dtype, device=self._device)
            dist.recv(h, group=self._group, group_src=self._rank - 1)
            h = forward(mask=mask, input_pos=input_pos, hidden_state=h)
        if self.is_last:
            return h
        dist.send(h.contiguous(), group=self._group, group_dst=self._rank + 1)
        return None

    def unembed(self, h: Tensor) -> Tensor:
        """Final norm and projection to logits, on the last rank."""
        return self.decoder.unembed(h)

    def share_tokens(self, tokens: Tensor | None, batch_size: int) -> Tensor:
        """Give every rank the tokens that the last rank chose.

        Args:
            tokens (Tensor | None): int64 ``[b]`` on the last rank; the others' is not looked at.
            batch_size (int): b.

        Returns:
            Tensor: the last rank's tokens.
        """
        if not self.is_last:
            tokens = torch.empty(batch_size, dtype=torch.int64, device=self._device)
        last = dist.get_world_size(self._group) - 1
        dist.broadcast(tokens, group=self._group, group_src=last)
        return tokens

    def require_same(self, what: str, value: Any) -> None:
        """Check that all ranks hold an equal value, which they would otherwise wait on for ever.

        Raises:
            ValueError: On every rank, naming the first rank that differs from rank 0.
        """
        values = _gather(value, self._group)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(f"rank {rank} makes another {what} than rank 0")


def _require_initialized() -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            "a Pipeline needs torch.distributed: start the program with tune run "
            "--nproc_per_node N or torchrun, and call torch.distributed.init_process_group first"
        )


def _gather(value: T, group: dist.ProcessGroup | None) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _all_or_none(work: Callable[[], T], what: str, group: dist.ProcessGroup | None) -> T:
    """Do this rank's work; if it fails on any rank, fail on all, so that none waits for it."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    failures = _gather(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise RankError(f"rank {rank} could not {what}: {failure}")
    return result
