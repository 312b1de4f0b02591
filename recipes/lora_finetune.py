"""Fine-tune a model by LoRA, on one device or with the model spread over several (FSDP2).

Run it with::

    tune run torchtune_fused/recipes/lora_finetune.py --config smollm2_135m/lora_finetune

and with ``--nproc_per_node N`` before the recipe for N processes.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from torchtune_fused import ShardTransformerDecoder
from torchtune_fused.checkpoint.peft import read_adapter, write_adapter
from torchtune_fused.checkpoint.pretrained import write_pretrained
from torchtune_fused.recipe_config import check_flags, expand_path, parse
from torchtune_fused.recipe_model import device_and_dtype
from torchtune_fused.training.lora import adapter_weights, read_lora
from torchtune_fused.training.plan import make_plan
from torchtune_fused.training.processes import start_processes
from torchtune_fused.training.trainer import Trainer


@parse
def main(cfg: DictConfig) -> None:
    """Fine-tune a model by LoRA; key=value overrides any key of the config.

    checkpoint     folder of the base model, or a repository of the Hugging Face Hub
    lora           which layers get adapters, and what kind, by torchtune's names:
      lora_attn_modules     any of q_proj, k_proj, v_proj, output_proj
      apply_lora_to_mlp     whether the three layers of each MLP get some
      apply_lora_to_output  whether the head gets one, if it is not the embedding
      lora_rank, lora_alpha, lora_dropout
                            the adapters are scaled by lora_alpha / lora_rank
    save_adapter_weights_only
                   whether a checkpoint holds no more than a folder `adapter`, for the peft package;
                   or also the whole model with the adapters merged, which `generate` loads
    all other keys as of full_finetune (see its --help)
    """
    device, dtype = device_and_dtype(cfg)
    lora = read_lora(cfg.get("lora"))
    check_flags(cfg, "save_adapter_weights_only")
    with start_processes(device) as processes:
        plan = make_plan(cfg, processes, dtype, recipe="lora_finetune", lora=asdict(lora))
        lora.check(plan.model)
        base = expand_path(cfg.checkpoint)
        model = ShardTransformerDecoder.from_pretrained(
            base, dtype=dtype, device=processes.loading_device, patch=False
        )
        lora.apply(model, cfg.seed)
        if plan.resumed is not None:
            read_adapter(plan.model, adapter_weights(model.state_dict()), plan.resumed / "adapter")

        def write(weights: Mapping[str, Tensor], folder: Path) -> None:
            write_adapter(
                plan.model,
                adapter_weights(weights),
                folder / "adapter",
                base=base,
                rank=lora.lora_rank,
                alpha=lora.lora_alpha,
                dropout=lora.lora_dropout,
            )
            if not cfg.save_adapter_weights_only:
                write_pretrained(plan.model, lora.merge(weights), folder)

        Trainer(cfg, plan, model, write).run()


if __name__ == "__main__":
    main()
