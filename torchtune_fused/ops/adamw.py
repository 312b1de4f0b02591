"""A step of AdamW on many tensors, in place: each is read once and written once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchtune_fused.ops._library import (
    LIBRARY,
    check_device,
    check_floating,
    check_tensor,
    define_op,
    is_traced,
)


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
) -> None:
    """Updates parameters and the moments of their gradients; computes in fp32, fp64 for fp64.

    Method: Loshchilov and Hutter, Decoupled weight decay regularization, 2019,
    https://arxiv.org/abs/1711.05101.

    Args:
        params (Sequence[Tensor]): contiguous, of any shapes, one floating-point dtype and one
            device; changed in place.
        grads (Sequence[Tensor]): their gradients; all that follows is like the parameters.
        exp_avgs (Sequence[Tensor]): first moments, changed in place.
        exp_avg_sqs (Sequence[Tensor]): second moments, changed in place.
        steps (Sequence[Tensor]): fp32 scalars on the same device: the number of this step for each
            parameter, from 1.
        lr (float): learning rate.
        betas (tuple[float, float]): decay of the two moments.
        eps (float): added to the root of the second moment.
        weight_decay (float): what is taken off a parameter, as a share of it per learning rate.
        maximize (bool): whether to go up the gradient.

    Raises:
        TypeError: if dtypes differ, or are not as they should be.
        ValueError: if the lists are not equally long, or shapes, strides or devices don't fit.
        RuntimeError: for either, where it is the CUDA kernel that finds it.
    """
    lists = [list(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    if not any(lists):
        return
    # Who takes them checks them, be it the reference, the kernel or the fake, and nobody else: a
    # model has hundreds of tensors, and steps often.
    torch.ops.torchtune_fused.adamw_(*lists, lr, *betas, eps, weight_decay, maximize)
    if not is_traced():  # whoever has saved a parameter for a backward pass is to know
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


def _check(params, grads, exp_avgs, exp_avg_sqs, steps):
    op = "adamw_"
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in (lists | {"steps": steps}).items():
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} must be {len(params)} tensors, got {len(tensors)}")
    first = params[0]
    check_floating(op, "params", first)
    for name, tensors in lists.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            check_tensor(op, f"{name}[{i}]", tensor, param.shape, "params[0]", first)
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name}[{i}] must be contiguous")
    for i, step in enumerate(steps):
        check_device(op, f"steps[{i}]", step, "params[0]", first)
        if step.dtype != torch.float32 or step.numel() != 1:
            raise TypeError(
                f"{op}: steps[{i}] must be one torch.float32, got {step.numel()} of {step.dtype}"
            )


@define_op(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize) -> ()"
)
def _reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, *options):
    eps, weight_decay, maximize = options
    _check(params, grads, exp_avgs, exp_avg_sqs, steps)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        amsgrad=False,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )


@torch.library.register_fake("torchtune_fused::adamw_", lib=LIBRARY)
def _(params, grads, exp_avgs, exp_avg_sqs, steps, *_):
    _check(params, grads, exp_avgs, exp_avg_sqs, steps)
