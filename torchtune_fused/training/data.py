"""From a dataset to the batches of each step, the same ones however many processes share them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, ListConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchtune.data import padded_collate_packed, padded_collate_sft
from torchtune.datasets import ConcatDataset, PackedDataset

from torchtune_fused.recipe_component import instantiate

Batch = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """Which rows of a dataset each step trains on.

    A step takes the next ``batch_size * accumulation * processes`` rows of its epoch's order, which
    follows from ``seed + epoch`` alone. So two processes train on the same rows in the same steps
    as one with twice the ``batch_size`` or twice the ``accumulation``, and any step can be the
    first one. Rows that don't fill a last step are left out of their epoch.

    Args:
        rows (int): Rows of the dataset.
        batch_size (int): Rows that a process runs at once.
        accumulation (int): How often it does so for a step.
        processes (int): How many processes share a step.
        epochs (int): Passes over the dataset.
        max_steps_per_epoch (int | None): Steps after which an epoch ends early.
        seed (int): Decides the order of the rows.
        shuffle (bool): Whether they are shuffled at all.

    Raises:
        ValueError: If the dataset has less rows than a step takes.
    """

    rows: int
    batch_size: int
    accumulation: int
    processes: int
    epochs: int
    max_steps_per_epoch: int | None
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.rows < self.rows_per_step:
            raise ValueError(
                f"the dataset has {self.rows} rows, but one step takes {self.rows_per_step}: lower "
                "batch_size or gradient_accumulation_steps, or do not pack"
            )

    @property
    def rows_per_step(self) -> int:
        """Rows that all processes together train on in one step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the dataset."""
        steps = self.rows // self.rows_per_step
        return min(steps, self.max_steps_per_epoch or steps)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def batches(self, rank: int, first_step: int) -> Iterator[list[int]]:
        """Rows of each batch that a rank runs, from a step on to the last."""
        for epoch in range(first_step // self.steps_per_epoch, self.epochs):
            order = self._order(epoch)
            done = max(first_step - epoch * self.steps_per_epoch, 0)
            for step in range(done, self.steps_per_epoch):
                start = step * self.rows_per_step
                own = order[start + rank : start + self.rows_per_step : self.processes]
                yield from (rows.tolist() for rows in own.split(self.batch_size))

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.rows)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.rows, generator=generator)


def build_dataset(components: DictConfig | ListConfig, tokenizer: Any) -> Dataset:
    """The dataset of a config: one component, or a list of them, one behind the other."""
    if isinstance(components, ListConfig):
        return ConcatDataset([instantiate("dataset", part, tokenizer) for part in components])
    return instantiate("dataset", components, tokenizer)


def read_steps(
    dataset: Dataset,
    schedule: Schedule,
    *,
    rank: int,
    first_step: int,
    pad_id: int,
    ignore_index: int,
) -> Iterator[list[Batch]]:
    """The batches that a rank runs for each step, from a step on to the last.

    Args:
        dataset (Dataset): Rows as torchtune's datasets give them, packed or not.
        schedule (Schedule): Which rows when.
        rank (int): The rank.
        first_step (int): Number of steps that are done already.
        pad_id (int): Token that fills up short rows.
        ignore_index (int): Their label.

    Yields:
        list[Batch]: ``accumulation`` batches of tokens and labels ``[batch_size, s]``, int64, and
        of packed rows also ``input_pos`` and ``mask``. The label of a token is the one after it.
    """
    collate = partial(padded_collate_sft, padding_idx=pad_id, ignore_idx=ignore_index)
    if _is_packed(dataset):
        collate = padded_collate_packed
    order = schedule.batches(rank, first_step)

    def collate_shifted(rows: list[Batch]) -> Batch:
        batch = collate(rows)
        return {**batch, "labels": F.pad(batch["labels"][:, 1:], (0, 1), value=ignore_index)}

    batches = iter(DataLoader(dataset, batch_sampler=order, collate_fn=collate_shifted))
    while step := list(islice(batches, schedule.accumulation)):
        yield step


def _is_packed(dataset: Dataset) -> bool:
    return isinstance(dataset, PackedDataset) or getattr(dataset, "packed", False)
