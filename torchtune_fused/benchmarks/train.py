"""Section train: tokens per second of full fine-tuning."""

from collections.abc import Iterator

from torchtune_fused.benchmarks.contest import (
    COMPILED,
    LIGER,
    OURS,
    TORCHTUNE,
    TRANSFORMERS,
    Contest,
)
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.trainers import shifted, torchtune_trainers
from torchtune_fused.benchmarks.transformers_trainer import transformers_trainers
from torchtune_fused.flops import training_flops


def train(setting: Setting) -> Iterator[Contest]:
    """One optimizer step on all weights."""
    for batch_size, seq_len in setting.shapes("train"):
        setting.check_length(seq_len)
        tokens = setting.random_tokens(batch_size, seq_len)
        systems = {
            **torchtune_trainers(setting, lambda t=tokens: {"tokens": t}, shifted(tokens)),
            **transformers_trainers(setting, tokens),
        }
        yield Contest(
            section="train",
            work=f"train {batch_size} x {seq_len}",
            tokens=batch_size * seq_len,
            systems=[systems[n] for n in (TORCHTUNE, COMPILED, TRANSFORMERS, LIGER, OURS)],
            flops=training_flops(setting.structure, batch_size, seq_len),
        )
