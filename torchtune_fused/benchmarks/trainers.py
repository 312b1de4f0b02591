"""Systems that train: one optimizer step, forward, loss, backward and AdamW."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_fused import AdamW
from torchtune_fused.benchmarks.contest import COMPILED, OURS, TORCHTUNE, System
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.recipe_component import instantiate

Inputs = Callable[[], dict[str, Tensor]]


def torchtune_trainers(setting: Setting, inputs: Inputs, labels: Tensor) -> dict[str, System]:
    """Systems of torchtune: as its recipes run it, eager and compiled, and patched by us.

    What they build takes a step and returns its loss.

    Args:
        setting (Setting): Says which model; if it has LoRA adapters, only they are trained.
        inputs (Inputs): Makes the arguments of the model, once a step.
        labels (Tensor): int64 ``[b, s]``, already shifted.
    """
    instantiate("loss", setting.cfg.loss)  # what is wrong with it shows before anything is loaded

    def build(*, patch: bool = False, compiled: bool = False) -> Callable[[], Tensor]:
        model = setting.load_model(patch=patch).train()
        if adapters := get_adapter_params(model):
            set_trainable_params(model, adapters)
        loss = instantiate("loss", setting.cfg.loss) if patch else CEWithChunkedOutputLoss()
        if compiled:  # as `compile: True` does it in torchtune's recipes
            training.compile_model(model, verbose=False)
            loss = training.compile_loss(loss, verbose=False)
        optimizer = fused_adamw(model, AdamW if patch else torch.optim.AdamW)
        return _step(model, loss, optimizer, inputs, labels)

    systems = [
        System(TORCHTUNE, build),
        System(COMPILED, lambda: build(compiled=True)),
        System(OURS, lambda: build(patch=True)),
    ]
    return {system.name: system for system in systems}


def shifted(tokens: Tensor, ignore_index: int = -100) -> Tensor:
    """The label of each token: the next one, and none for the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=ignore_index)


def fused_adamw(
    model: nn.Module, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    """The optimizer of a system, over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return kind(trained, lr=1e-5, fused=True)


def _step(
    model: TransformerDecoder,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Inputs,
    labels: Tensor,
) -> Callable[[], Tensor]:
    chunks = getattr(loss, "num_output_chunks", None)
    if chunks is not None:
        model.set_num_output_chunks(chunks)

    def loss_of_step() -> Tensor:
        # The logits go when this returns: the backward pass needs their memory.
        logits = model(**inputs())
        if chunks is None:
            return loss(logits.flatten(0, 1), labels.flatten())
        return loss(logits, labels)

    def step() -> Tensor:
        result = loss_of_step()
        result.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return result.detach()

    return step
