"""Section lora: tokens per second of LoRA fine-tuning."""

from collections.abc import Iterator

from torchtune.modules.peft import get_adapter_params, set_trainable_params

from torchtune_fused.benchmarks.contest import Contest
from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.benchmarks.trainers import shifted, torchtune_trainers
from torchtune_fused.flops import training_flops


def lora(setting: Setting) -> Iterator[Contest]:
    """One optimizer step on the adapters of ``lora.model``, whose weights are random."""
    shapes = setting.shapes("lora")
    if setting.cfg.lora.get("model") is None:
        raise ValueError("section lora needs lora.model, a component with LoRA adapters")
    setting = setting.of_model(setting.cfg.lora.model)
    adapters = get_adapter_params(setting.structure)
    if not adapters:
        raise ValueError(f"lora.model: {setting.cfg.model['_component_']} has no LoRA adapters")
    set_trainable_params(setting.structure, adapters)
    for batch_size, seq_len in shapes:
        setting.check_length(seq_len)
        tokens = setting.random_tokens(batch_size, seq_len)
        systems = torchtune_trainers(setting, lambda t=tokens: {"tokens": t}, shifted(tokens))
        yield Contest(
            section="lora",
            work=f"LoRA {batch_size} x {seq_len}",
            tokens=batch_size * seq_len,
            systems=list(systems.values()),
            flops=training_flops(setting.structure, batch_size, seq_len),
        )
