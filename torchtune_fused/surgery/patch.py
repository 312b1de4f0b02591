"""patch_model and unpatch_model: torchtune's modules out, fused ones in, and back."""

import re
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from torchtune_fused.surgery.compute_dtype import (
    cast_parameters,
    check_compute_dtype,
    restore_parameters,
)
from torchtune_fused.surgery.registry import Builder, Decline, all_builders

# Kept in a fused module's __dict__, so that copies of it can be unpatched too: the class the module
# had or, if the fused one has a state of its own, the original; and the class it was given.
_STOCK = "_torchtune_fused_stock"


@dataclass(frozen=True)
class PatchReport:
    """What `patch_model` did.

    Args:
        swapped (dict[str, str]): for each module replaced, by name, the class it has now.
        declined (dict[str, str]): for each module with a builder that left it alone, the reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"patched {len(self.swapped)} modules", *_summary(self.swapped)]
        if self.declined:
            lines += [f"left {len(self.declined)} as they are", *_summary(self.declined)]
        return "\n".join(lines)


def _summary(modules: dict[str, str]) -> list[str]:
    """One line for all layers alike, such as ``16 x layers.*.attn: FusedAttention``."""
    names = ((re.sub(r"\b\d+\b", "*", name) or "the model", of) for name, of in modules.items())
    return [f"  {count} x {name}: {of}" for (name, of), count in Counter(names).items()]


def patch_model(model: nn.Module, *, compute_dtype: torch.dtype | None = None) -> PatchReport:
    """Replaces the modules of a model that have a builder by their fused counterparts, in place.

    The results, the state dict, the parameters themselves, hooks and caches stay what they are.
    Patching a patched model changes nothing. If a builder fails, nothing has been changed.

    Args:
        model (nn.Module): any model built from torchtune's modules, on any device, with its weights
            loaded or not.
        compute_dtype (torch.dtype | None): for a model whose callers use another dtype, such as
            fp32: cast its parameters to fp16 or bf16 once, here. Fused modules cast what they are
            given and return the caller's dtype. Default: leave the parameters as they are.

    Returns:
        PatchReport: which modules were replaced, and which were not and why.

    Raises:
        TypeError: if a builder returns what can't stand in for its module.
        ValueError: if ``compute_dtype`` is not a floating-point dtype, or the model has KV caches
            of another one.
        ImportError: if the builders of an installed package can't be loaded.
    """
    if compute_dtype is not None:
        check_compute_dtype(model, compute_dtype)
    report = PatchReport()
    claims: dict[nn.Module, nn.Module] = {}
    _claim(model, "", all_builders(), claims, report, seen=set())

    moved = {}
    for module, replacement in claims.items():
        if vars(replacement) is vars(module):
            # Whoever holds the module, a parent or the caller, now holds the fused one.
            vars(module)[_STOCK] = type(module), type(replacement)
            module.__class__ = type(replacement)
        else:
            vars(replacement)[_STOCK] = module, type(replacement)
            moved[module] = replacement
    _substitute(model, moved)
    if compute_dtype is not None:
        cast_parameters(model, compute_dtype)
    return report


def unpatch_model(model: nn.Module) -> None:
    """Gives a model its original modules back, with the weights as they are now.

    Parameters that ``compute_dtype`` cast get their dtype back, not the bits that it cost them.

    Args:
        model (nn.Module): a model after `patch_model`, or a copy of one. Fused modules that a model
            was built with are not touched.

    Raises:
        RuntimeError: if a fused module was changed in a way that its original can't take over: its
            class again (by a parametrisation or FSDP), or the state dict of a module from another
            package. The model is unchanged then.
    """
    patched = {name: m for name, m in model.named_modules() if _STOCK in vars(m)}
    moved = {}
    for name, module in patched.items():
        stock, fused = vars(module)[_STOCK]
        if type(module) is not fused:
            raise RuntimeError(
                f"{name!r} was patched to be {fused.__name__} and has become "
                f"{type(module).__name__} since; undo that before unpatching"
            )
        if isinstance(stock, nn.Module):
            _load_state(stock, module)
            moved[module] = stock
    for module in patched.values():
        stock, _ = vars(module).pop(_STOCK)
        if module not in moved:
            module.__class__ = stock
    _substitute(model, moved)
    restore_parameters(model)


def _claim(
    module: nn.Module,
    name: str,
    builders: dict[type[nn.Module], Builder],
    claims: dict[nn.Module, nn.Module],
    report: PatchReport,
    seen: set[nn.Module],
) -> None:
    """Asks the builders for ``module`` and what it contains; changes only the last three."""
    if module in seen:
        return
    seen.add(module)
    builder = builders.get(type(module))
    if builder is not None:
        built = _build(builder, module, name)
        if isinstance(built, Decline):
            report.declined[name] = built.reason
        else:
            claims[module] = built
            report.swapped[name] = type(built).__name__
            if vars(built) is not vars(module):
                return  # What is inside goes with the module.
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        _claim(child, path, builders, claims, report, seen)


def _build(builder: Builder, module: nn.Module, name: str) -> nn.Module | Decline:
    if "forward" in vars(module):
        return Decline("its forward was replaced on the instance, which a fused one would ignore")
    built = builder(module)
    if isinstance(built, Decline):
        return built
    if not isinstance(built, nn.Module):
        raise TypeError(
            f"the builder for {type(module).__name__} must return a module or a Decline, got "
            f"{type(built).__name__} for {name!r}"
        )
    if vars(built) is not vars(module):
        if not name:
            return Decline("it is the model itself, and its replacement is another object")
        if _shapes(built) != _shapes(module):
            raise TypeError(
                f"the replacement of {name!r} must have the state-dict keys and shapes of "
                f"{type(module).__name__}, got {_shapes(built)} instead of {_shapes(module)}"
            )
    return built


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def _load_state(original: nn.Module, replacement: nn.Module) -> None:
    """Makes the tensors of a replacement those of the original."""
    state = replacement.state_dict(keep_vars=True)
    trainable = {name: tensor.requires_grad for name, tensor in state.items()}
    original.load_state_dict(state, assign=True)
    for name, parameter in original.named_parameters():
        parameter.requires_grad_(trainable[name])
    original.train(replacement.training)


def _substitute(model: nn.Module, moved: dict[nn.Module, nn.Module]) -> None:
    """Puts other modules into every place where a module is registered."""
    if not moved:
        return
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in moved:
                parent._modules[name] = moved[child]
