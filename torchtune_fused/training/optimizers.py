"""The optimizer of a run, stepping after the backward pass or, weight by weight, within it."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torchtune import config, training

from torchtune_fused.recipe_component import instantiate


class Optimizers:
    """One optimizer for all trainable parameters; or one for each, which spares the gradients.

    In the backward pass, each parameter is updated as soon as its gradient is there, and the
    gradient freed (Lv et al., 2023, "Full parameter fine-tuning for large language models with
    limited resources", https://arxiv.org/abs/2306.09782). That leaves no moment in which all
    gradients exist, so none to accumulate or clip them in.

    Args:
        model (nn.Module): Its parameters are trained, but for those that need no gradient.
        optimizer (DictConfig): Component of the optimizer.
        lr_scheduler (DictConfig | None): Component of the learning rate's schedule.
        steps (int): Steps of the whole run, for the schedule.
        in_backward (bool): Whether to step in the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: DictConfig,
        lr_scheduler: DictConfig | None,
        *,
        steps: int,
        in_backward: bool,
    ) -> None:
        self._model = model
        self._in_backward = in_backward
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if in_backward:
            of = {p: config.instantiate(optimizer, [p]) for p in self._parameters}
            training.register_optim_in_bwd_hooks(model, of)
            self._optimizers = list(of.values())
        else:
            self._optimizers = [config.instantiate(optimizer, self._parameters)]
        self._schedulers = []
        if lr_scheduler is not None:
            self._schedulers = [
                config.instantiate(lr_scheduler, one, num_training_steps=steps)
                for one in self._optimizers
            ]

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._optimizers[0].param_groups[0]["lr"]

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to a norm of ``max_norm``; returns the norm they had."""
        norm = nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self) -> None:
        """Update the parameters, if the backward pass has not, and the learning rate."""
        if not self._in_backward:
            self._optimizers[0].step()
            self._optimizers[0].zero_grad(set_to_none=True)
        for scheduler in self._schedulers:
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """The state by names of parameters, whole and on the CPU; all ranks call it.

        Returns:
            dict[str, Any]: tensors and plain values; of no meaning on ranks other than the first.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self._model, self._optimizers, options=options)
        schedule = self._schedulers[0].state_dict() if self._schedulers else None
        return {"optimizer": state, "lr_scheduler": schedule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; every rank has all of it, and takes its part."""
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(self._model, self._optimizers, state["optimizer"], options=options)
        for scheduler in self._schedulers:
            scheduler.load_state_dict(state["lr_scheduler"])


def check_optimizer(optimizer: DictConfig, lr_scheduler: DictConfig | None) -> None:
    """Try the components of an optimizer on a parameter of one element.

    Raises:
        ValueError: If they can't be built, or are none.
    """
    built = instantiate("optimizer", optimizer, [nn.Parameter(torch.zeros(1))])
    if not isinstance(built, torch.optim.Optimizer):
        raise ValueError(f"optimizer: {optimizer['_component_']} is not an optimizer")
    if lr_scheduler is None:
        return
    built = instantiate("lr_scheduler", lr_scheduler, built, num_training_steps=1)
    if not isinstance(built, torch.optim.lr_scheduler.LRScheduler):
        raise ValueError(f"lr_scheduler: {lr_scheduler['_component_']} is not a scheduler")
