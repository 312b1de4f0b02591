"""AdamW at the speed at which memory can be read and written."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from torchtune_fused.ops import adamw_


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW(fused=True)`` with a kernel of ours.

    The state is that of torch's, and states go from one to the other. In the config of any recipe::

        optimizer:
          _component_: torchtune_fused.AdamW
          lr: 2.0e-5

    Parameters of several dtypes and devices are stepped on together, those sharded by FSDP2 on each
    rank's part. What the kernel can't take is left to torch's, and a warning says why: ``amsgrad``,
    a learning rate or betas in tensors, scaled gradients, and tensors that are not contiguous or
    differ in dtype from their gradients. As step counts are on the parameters' device, a step can
    be captured in a CUDA graph, whether or not it is said to be ``capturable``.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable,
            differentiable, fused: As in torch.

    Raises:
        RuntimeError: If ``foreach`` or ``differentiable``, which torch's fused optimizers are not.
        ValueError: If ``fused`` is False.
    """

    def __init__(self, params, *args, fused: bool | None = None, **kwargs) -> None:
        if fused is False:
            raise ValueError("torchtune_fused.AdamW is always fused: use torch.optim.AdamW")
        super().__init__(params, *args, fused=True, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure (Callable[[], Any] | None): Computes the loss anew, and the gradients.

        Returns:
            Any: What ``closure`` returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists = [[] for _ in range(6)]
            self._init_group(group, *lists)
            tensors, steps = lists[:4], lists[5]
            obstacle = self._obstacle(group, *tensors)
            if obstacle is None:
                _step(group, *tensors, steps)
            else:
                if any(param.is_cuda for param in lists[0]):
                    warnings.warn(f"AdamW steps with torch's kernel, as {obstacle}", stacklevel=4)
                self._step_with_torch(group, *lists)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, of this optimizer or of any of torch's that compute AdamW.

        Args:
            state_dict (dict[str, Any]): What ``state_dict()`` returned there.
        """
        # How it was computed there is no part of what goes on here.
        same = {"fused": True, "foreach": None, "differentiable": False}
        groups = [group | same for group in state_dict["param_groups"]]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def _obstacle(self, group, *lists) -> str | None:
        """Why a group is not for the kernel; None if it is."""
        if group["amsgrad"]:
            return "amsgrad is set"
        if any(isinstance(value, Tensor) for value in (group["lr"], *group["betas"])):
            return "the learning rate or a beta is a tensor"
        if any(value is not None for value in self._scaling()):
            return "the gradients are scaled"
        return _obstacle_of(*lists)

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """What a ``GradScaler`` leaves here for the time of a step."""
        return getattr(self, "grad_scale", None), getattr(self, "found_inf", None)

    def _step_with_torch(self, group, *lists) -> None:
        options = ("fused", "amsgrad", "lr", "weight_decay", "eps", "maximize")
        (beta1, beta2), (grad_scale, found_inf) = group["betas"], self._scaling()
        adamw(
            *lists,
            **{name: group[name] for name in options},
            beta1=beta1,
            beta2=beta2,
            grad_scale=grad_scale,
            found_inf=found_inf,
        )


def _obstacle_of(params, *others) -> str | None:
    """Why parameters, their gradients and moments are not for the kernel; None if they are."""
    # List by list, since this is done for every step.
    dtypes, placements = [p.dtype for p in params], _placements(params)
    for tensors in (params, *others):
        if _placements(tensors) != placements:
            return "a gradient or its moments are not sharded as their parameter is"
        tensors = _local(tensors)
        if strange := set(map(type, tensors)) - {Tensor, nn.Parameter}:
            return f"a tensor is a {strange.pop().__name__}"
        if [t.dtype for t in tensors] != dtypes:
            return "gradients or moments have another dtype than their parameter"
        if not all(map(Tensor.is_contiguous, tensors)):
            return "a tensor is not contiguous"
    return None


def _step(group, *lists) -> None:
    """Step on this rank's part of the tensors, those of one kind together."""
    kinds = defaultdict(list)
    for tensors in zip(*map(_local, lists), strict=True):
        kinds[tensors[0].device, tensors[0].dtype].append(tensors)
    options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "maximize")}
    for tensors in kinds.values():
        *of_params, steps = zip(*tensors, strict=True)
        torch._foreach_add_(steps, 1)
        adamw_(*of_params, steps, **options)


def _placements(tensors) -> list | None:
    """How tensors are sharded; None if none of them is."""
    if DTensor not in map(type, tensors):
        return None
    return [t.placements if isinstance(t, DTensor) else None for t in tensors]


def _local(tensors) -> list[Tensor]:
    if DTensor not in map(type, tensors):
        return tensors
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
