"""Section decode: tokens per second after a prompt."""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import torch
from torchtune.modules import TransformerDecoder

from torchtune_fused.benchmarks.contest import Contest
from torchtune_fused.benchmarks.generators import generators
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.recipe_config import check_count
from torchtune_fused.recipe_timing import seconds_of

_ROUND_SECONDS = 0.5  # at least, of each system


def decode(setting: Setting) -> Iterator[Contest]:
    """One step of decoding; the prefill of the prompt is not counted."""
    options = setting.section("decode")
    new = check_count("decode.new_tokens", options.new_tokens)
    if new < 2:
        raise ValueError("decode.new_tokens must be at least 2: the first one is the prefill's")

    def step_seconds(run: Callable[[int], None]) -> float:
        steps = []  # a prefill may take longer by some steps than another: so of several pairs
        until = perf_counter() + _ROUND_SECONDS
        while not steps or perf_counter() < until:
            whole, first = (seconds_of(lambda n=n: run(n)) for n in (new, 1))
            steps.append((whole - first) / (new - 1))
        return median(steps)

    for batch_size, prompt_len in setting.shapes("decode"):
        yield Contest(
            section="decode",
            work=f"decode {batch_size} x {new} after {prompt_len}",
            tokens=batch_size,
            systems=list(generators(setting, batch_size, prompt_len, new).values()),
            moved_bytes=step_bytes(
                setting.structure, setting.dtype, batch_size, prompt_len + new // 2
            ),
            clock=step_seconds,
            warm_up=1,  # of many steps each
        )


def step_bytes(model: TransformerDecoder, dtype: torch.dtype, batch_size: int, length: int) -> int:
    """The fewest bytes a decoding step moves: each weight once, the filled part of the caches."""
    values = sum(p.numel() for p in model.parameters())
    if isinstance(model.output, torch.nn.Module):  # of an untied embedding, only a row is read
        values -= model.tok_embeddings.weight.numel()
    for layer in model.layers:
        values += 2 * batch_size * layer.attn.num_kv_heads * layer.attn.head_dim * length
    return values * dtype.itemsize
