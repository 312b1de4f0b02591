"""Section prefill: prompt tokens per second, up to the first new token."""

from collections.abc import Iterator
from dataclasses import replace

from torchtune_fused.benchmarks.contest import OURS, TORCHTUNE, Contest, System
from torchtune_fused.benchmarks.generators import generators
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.flops import prefill_flops


def prefill(setting: Setting) -> Iterator[Contest]:
    """Prompts into empty KV caches, and the first token from the last position's logits.

    torchtune's generate projects every position, ours the last one. torchtune compiled is no
    system of its own here: it compiles the steps that follow.
    """
    for batch_size, prompt_len in setting.shapes("prefill"):
        systems = generators(setting, batch_size, prompt_len, new=1)
        yield Contest(
            section="prefill",
            work=f"prefill {batch_size} x {prompt_len}",
            tokens=batch_size * prompt_len,
            systems=[_first_token(systems[name]) for name in (TORCHTUNE, OURS)],
            flops=prefill_flops(setting.structure, batch_size, prompt_len),
        )


def _first_token(system: System) -> System:
    """The system, generating one token."""

    def build():
        run = system.build()
        return lambda: run(1)

    return replace(system, build=build)
