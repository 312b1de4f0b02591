"""Fine-tune all weights of a model, on one device or with the model spread over several (FSDP2).

Run it with::

    tune run torchtune_fused/recipes/full_finetune.py --config smollm2_135m/full_finetune

and with ``--nproc_per_node N`` before the recipe for N processes.
"""

from functools import partial

from omegaconf import DictConfig

from torchtune_fused import ShardTransformerDecoder
from torchtune_fused.checkpoint.pretrained import write_pretrained
from torchtune_fused.recipe_config import expand_path, parse
from torchtune_fused.recipe_model import device_and_dtype
from torchtune_fused.training.plan import make_plan
from torchtune_fused.training.processes import start_processes
from torchtune_fused.training.trainer import Trainer


@parse
def main(cfg: DictConfig) -> None:
    """Fine-tune all weights of a model; key=value overrides any key of the config.

    checkpoint     folder of the model, or a repository of the Hugging Face Hub
    tokenizer, dataset, loss, optimizer, lr_scheduler, metric_logger
                   components, as in torchtune's recipes; lr_scheduler and metric_logger may be
                   null, dataset a list
    device, dtype  auto, cuda or cpu; fp32 or bf16
    patch          whether to swap in the fused modules
    compile        whether to compile layers and loss
    enable_activation_checkpointing, enable_activation_offloading
                   whether to compute activations again in the backward pass; and to keep the inputs
                   that this takes on the CPU
    optimizer_in_bwd
                   whether to update each weight as soon as its gradient is there
    batch_size, gradient_accumulation_steps
                   rows that each process runs at once, and how often it does so for a step: N
                   processes train on the same rows in the same steps as one with N times either
    epochs, max_steps_per_epoch
                   passes over the dataset, and steps after which each ends early (null: never)
    clip_grad_norm the norm that gradients are scaled down to (null: never)
    seed, shuffle  decide the order of the rows; the seed also decides dropout
    output_dir     where checkpoints go: folders step_<number>, which `generate` and transformers
                   load, and the config
    resume         whether to go on from the newest checkpoint in it, if there is one; the losses
                   are those of a run that was never stopped, so model, optimizer, schedule and rows
                   must be those it began with
    save_every_n_steps, keep_last_n_checkpoints
                   a checkpoint is written so often (null: only at the end), the newest are kept
    log_every_n_steps
                   loss, learning rate, norm of the gradients, tokens (padding included) per second
                   of all processes, MFU and peak memory are logged so often
    """
    if cfg.get("lora") is not None:
        raise ValueError("the config has a section lora, which is for lora_finetune.py")
    device, dtype = device_and_dtype(cfg)
    with start_processes(device) as processes:
        plan = make_plan(cfg, processes, dtype, recipe="full_finetune")
        model = ShardTransformerDecoder.from_pretrained(
            plan.resumed or expand_path(cfg.checkpoint),
            dtype=dtype,
            device=processes.loading_device,
            patch=False,
        )
        Trainer(cfg, plan, model, partial(write_pretrained, plan.model)).run()


if __name__ == "__main__":
    main()
