"""Whether fused modules are as exact as torchtune's, against a truth in a wider dtype."""

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TiedLinear, TransformerDecoder
from tqdm import tqdm

from torchtune_fused.modules.decoder import CapturedSteps
from torchtune_fused.surgery import PatchReport, patch_model, unpatch_model

# The dtype of the truth for a model's dtype, and the error that one correct rounding may make
# relative to the largest value. In fp32 that is the exp of ATen's attention on CPUs, of 20 bits.
_TRUTH = {
    torch.bfloat16: (torch.float32, 2**-8),
    torch.float16: (torch.float32, 2**-11),
    torch.float32: (torch.float64, 2**-20),
}


@dataclass(frozen=True)
class Error:
    """How far a result is from the truth.

    Attributes:
        largest (float): The largest error of an element.
        relative (float): The norm of all errors over the norm of the truth.
    """

    largest: float
    relative: float

    @classmethod
    def of(cls, x: Tensor, truth: Tensor) -> "Error":
        """The error of a result of the shape of ``truth``, computed in the dtype of ``truth``."""
        difference = x.to(truth.dtype) - truth
        tiny = torch.finfo(truth.dtype).tiny  # so that no error at all is 0 for a truth of zeros
        relative = difference.norm() / truth.norm().clamp_min(tiny)
        return cls(difference.abs().max().item(), relative.item())


@dataclass(frozen=True)
class Comparison:
    """One result of a fused module or model, judged by stock's.

    It passes if it has the shape and dtype of stock's result, and its error is at most twice
    stock's plus one rounding of the model's dtype, in the largest element and in the norm.

    Attributes:
        name (str): What was run.
        output (str): Shape of the result; with stock's, and the dtypes, where they differ.
        stock (Error): Stock's error.
        fused (Error): Our error; infinite if shape or dtype differ.
        of_limit (float): Our error as a fraction of what is allowed; infinite if it is NaN.
        same_argmax (float): Fraction of rows in which our largest element is at stock's place.
    """

    name: str
    output: str
    stock: Error
    fused: Error
    of_limit: float
    same_argmax: float

    @property
    def passed(self) -> bool:
        """Whether fused is as exact as stock."""
        return self.of_limit <= 1


def compare(
    name: str, stock: Tensor, fused: Tensor, truth: Tensor, dtype: torch.dtype
) -> Comparison:
    """Judge a fused result by stock's.

    Args:
        name (str): What was run.
        stock (Tensor): Stock's result, ``[..., n]``.
        fused (Tensor): Our result.
        truth (Tensor): The same in the dtype of :func:`truth_dtype`.
        dtype (torch.dtype): The dtype that both computed in.

    Returns:
        Comparison: the errors of both, and whether ours is allowed.
    """
    stock_error = Error.of(stock, truth)
    if (fused.shape, fused.dtype) != (stock.shape, stock.dtype):
        output = f"{_kind(fused)}, not {_kind(stock)}"
        return Comparison(name, output, stock_error, Error(math.inf, math.inf), math.inf, 0.0)
    fused_error = Error.of(fused, truth)
    _, rounding = _TRUTH[dtype]
    fractions = (
        fused_error.largest / (2 * stock_error.largest + rounding * _largest(truth)),
        fused_error.relative / (2 * stock_error.relative + rounding),
    )
    of_limit = math.inf if any(map(math.isnan, fractions)) else max(fractions)
    same_argmax = (fused.argmax(-1) == stock.argmax(-1)).double().mean().item()
    shape = str(list(fused.shape))
    return Comparison(name, shape, stock_error, fused_error, of_limit, same_argmax)


def truth_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the truth for a model of ``dtype`` is computed.

    Raises:
        ValueError: If there is none.
    """
    if dtype not in _TRUTH:
        known = ", ".join(map(str, _TRUTH))
        raise ValueError(f"a model of {dtype} has no truth in a wider dtype; validate {known}")
    return _TRUTH[dtype][0]


def twins(model: TransformerDecoder) -> tuple[TransformerDecoder, TransformerDecoder, PatchReport]:
    """A model on torchtune's modules, and its patched twin, over the same weights.

    Args:
        model (TransformerDecoder): A whole model; it is unpatched, and its weights are frozen.

    Returns:
        tuple[TransformerDecoder, TransformerDecoder, PatchReport]: stock, fused, and what was
        swapped in the latter.

    Raises:
        ValueError: If the model is no TransformerDecoder, or nothing in it is swapped.
    """
    if not isinstance(model, TransformerDecoder):
        raise ValueError(f"expected a torchtune TransformerDecoder, got {type(model).__name__}")
    unpatch_model(model)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    fused = copy.deepcopy(model, shared)
    report = patch_model(fused)
    if not report.swapped:
        raise ValueError(f"no module of the model has a fused counterpart: {report}")
    stock = _plain(model)
    for twin in (stock, fused):
        twin.eval().requires_grad_(False)
    return stock, fused, report


@torch.no_grad()
def compare_modules(
    stock: TransformerDecoder,
    fused: TransformerDecoder,
    swapped: Collection[str],
    tokens: Tensor,
) -> Iterator[Comparison]:
    """Compare each swapped module, and each layer with one, without KV caches.

    All get the inputs that the stock model has at that place, so errors do not add up.

    Args:
        stock (TransformerDecoder): The model on torchtune's modules.
        fused (TransformerDecoder): Its twin.
        swapped (Collection[str]): Names of the modules to compare.
        tokens (Tensor): Token ids ``[b, s]``.

    Yields:
        Comparison: of one module, in the order in which they run; a layer after its parts.
    """
    x = tokens
    for name, block in tqdm(_blocks(stock).items(), desc="modules", disable=None):
        parts = [part for part in swapped if f"{part}.".startswith(f"{name}.")]
        if parts and name not in parts:
            parts.append(name)
        calls, x = _record(stock, parts, block, x)
        if not calls:
            continue
        dtype = next(block.parameters()).dtype
        wide = truth_dtype(dtype)
        truth_block = _widened(block, wide)
        for part, (args, kwargs, output) in calls.items():
            truth_part = truth_block.get_submodule(part[len(name) + 1 :])
            truth = truth_part(*_widened_inputs(args, wide), **kwargs)
            ours = fused.get_submodule(part)(*args, **kwargs)
            yield compare(part, output, ours, truth, dtype)


@torch.no_grad()
def true_logits(stock: TransformerDecoder, tokens: Tensor) -> Tensor:
    """Logits of the weights of a model, widened one layer at a time.

    Args:
        stock (TransformerDecoder): A model on torchtune's modules. Its norms and rotary embeddings
            compute in fp32 whatever they are given, so a truth in fp64 is one up to their rounding.
        tokens (Tensor): Token ids ``[b, s]``.

    Returns:
        Tensor: logits ``[b, s, vocab_size]`` in the dtype of :func:`truth_dtype`.
    """
    x, wide = tokens, truth_dtype(next(stock.parameters()).dtype)
    for block in tqdm(_blocks(stock).values(), desc="truth", disable=None):
        x = _widened(block, wide)(x)
    return x


def _plain(model: TransformerDecoder) -> TransformerDecoder:
    """The modules of a model in torchtune's own decoder, which captures no steps."""
    if not isinstance(model, CapturedSteps):
        return model
    names = ("tok_embeddings", "layers", "max_seq_len", "num_heads", "head_dim", "norm", "output")
    return TransformerDecoder(**{name: getattr(model, name) for name in names})


def _blocks(model: TransformerDecoder) -> dict[str, Any]:
    """What a decoder is a chain of."""
    layers = {f"layers.{name}": layer for name, layer in model.layers.named_children()}
    first, last = {"tok_embeddings": model.tok_embeddings}, {"norm": model.norm}
    return first | layers | last | {"output": model.output}


def _record(
    stock: TransformerDecoder, parts: list[str], block: Any, x: Tensor
) -> tuple[dict[str, tuple[tuple, dict, Tensor]], Tensor]:
    """Run a block; what went into and came out of each of its parts, and its output."""
    calls: dict[str, tuple[tuple, dict, Tensor]] = {}
    with ExitStack() as hooks:
        for part in parts:

            def keep(_module, args, kwargs, output, part=part):
                calls[part] = args, kwargs, output

            hook = stock.get_submodule(part).register_forward_hook(keep, with_kwargs=True)
            hooks.callback(hook.remove)
        output = block(x)
    return calls, output


def _widened(block: Any, dtype: torch.dtype) -> Any:
    """A copy of a block with its weights in another dtype."""
    block = copy.deepcopy(block)
    (block.tied_module if isinstance(block, TiedLinear) else block).to(dtype)
    return block


def _widened_inputs(args: tuple, dtype: torch.dtype) -> list:
    """Arguments of a module in another dtype; those that were one object still are."""
    wide = {id(x): x.to(dtype) for x in args if isinstance(x, Tensor) and x.is_floating_point()}
    return [wide.get(id(x), x) for x in args]


def _largest(x: Tensor) -> float:
    # Not 0, so that no error at all is within the limit for a truth of zeros.
    return max(x.abs().max().item(), torch.finfo(x.dtype).tiny)


def _kind(x: Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
