"""Every option of torchtune's own fine-tuning recipes, stock and fused, on a tiny model."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torchtune._cli.tune import main as tune

from torchtune_fused.build import load_kernels

FUSED = "torchtune_fused.fused_model"
BUILDERS = {
    "full": "torchtune.models.llama3_2.llama3_2",
    "lora": "torchtune.models.llama3_2.lora_llama3_2",
}
CONFIG = """\
tokenizer:
  _component_: torchtune_fused.generation.HFTokenizer
  path: ${checkpointer.checkpoint_dir}
  max_seq_len: 192
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  source: json
  split: train
  packed: false
seed: 7
shuffle: true
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA3
resume_from_checkpoint: false
batch_size: 1
epochs: 1
max_steps_per_epoch: 6
optimizer:
  _component_: torch.optim.AdamW
  lr: 2.0e-3
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 1
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
gradient_accumulation_steps: 1
optimizer_in_bwd: false
clip_grad_norm: null
compile: false
device: cpu
dtype: fp32
enable_activation_checkpointing: false
enable_activation_offloading: false
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}
  filename: losses.txt
log_every_n_steps: 1
log_peak_memory_stats: false
"""
TINY = {
    "vocab_size": 500,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 512,
    "rope_base": 10_000,
    "scale_factor": 1,
}
WIDE = {"embed_dim": 256, "intermediate_dim": 384}  # heads that the kernels take
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
# What torchtune's distributed recipes ask of a GPU, whether there is one or not; nothing else of
# them needs one.
ON_CPUS = """\
import runpy, sys
from pathlib import Path
import torch.distributed as dist
import torchtune
from torchtune import training

init = dist.init_process_group
dist.init_process_group = lambda *_: init("gloo")
training.cleanup_before_training = lambda: None
training.get_memory_stats = lambda **_: {}
training.log_memory_stats = lambda *_: None
recipe = sys.argv.pop(1)
folder = Path(torchtune.__file__).parents[1] / "recipes"
runpy.run_path(str(folder / f"{recipe}.py"), run_name="__main__")
"""
OPTIONS = {
    "plain": {},
    "compile": {"compile": True},
    "checkpointing": {"enable_activation_checkpointing": True},
    "in_backward": {"optimizer_in_bwd": True},
    "packed": {"dataset.packed": True, "tokenizer.max_seq_len": 400},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.fixture
def train(tiny_models, data, tmp_path, monkeypatch):
    """Losses of six steps of a built-in recipe on a tiny model."""

    def train(recipe, fused, *, kind=None, processes=1, device="cpu", **overrides):
        folder = tmp_path / f"{fused}-{processes}"
        config = OmegaConf.create(CONFIG)
        config.output_dir = str(folder)
        config.dataset.data_files = str(data)
        config.checkpointer.checkpoint_dir = str(tiny_models["tied"])
        sizes = TINY
        if device == "cuda":
            config.checkpointer.checkpoint_dir, sizes = str(tiny_models["wide"]), TINY | WIDE
            config.device, config.dtype = device, "bf16"
        else:  # all but the C++ compiler's minute
            monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
        kind = kind or recipe[:4]
        component = {"_component_": BUILDERS[kind]}
        if fused:
            component = {"_component_": FUSED, "builder": BUILDERS[kind]}
            config.loss._component_ = "torchtune_fused.modules.CEWithChunkedOutputLoss"
            config.optimizer._component_ = "torchtune_fused.AdamW"
        config.model = {**component, **sizes, **(LORA if kind == "lora" else {})}
        for key, value in overrides.items():
            OmegaConf.update(config, key, value)
        folder.mkdir()
        OmegaConf.save(config, folder / "config.yaml")
        arguments = ["run", recipe, "--config", str(folder / "config.yaml")]
        if processes == 1:
            monkeypatch.setattr("sys.argv", ["tune", *arguments])
            with pytest.raises(SystemExit) as exit:
                tune()
            assert exit.value.code in (0, None)
        else:
            torchrun = ["--standalone", "--nproc_per_node", str(processes)]
            command = ["torchtune._cli.tune", "run", *torchrun]
            if device == "cpu":
                script = folder / "on_cpus.py"
                script.write_text(ON_CPUS)
                command = ["torch.distributed.run", *torchrun, script]
            done = subprocess.run(
                [sys.executable, "-m", *command, *arguments[1:]],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr[-2000:]
        return [float(x) for x in re.findall(r"loss:([\d.]+)", (folder / "losses.txt").read_text())]

    return train


# Losses in fp32, whose sums run in another order, carried through six steps.
SAME = 1e-5

# torchtune's LoRA recipe steps after the backward pass only.
CASES = [("full", option) for option in OPTIONS]
CASES += [("lora", option) for option in OPTIONS if option != "in_backward"]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_every_option_of_the_builtin_recipes_runs_fused(train, kind, option):
    recipe = f"{kind}_finetune_single_device"
    stock = train(recipe, False, **OPTIONS[option])
    fused = train(recipe, True, **OPTIONS[option])
    assert len(stock) == 6
    assert stock[-1] != stock[0]
    assert fused == pytest.approx(stock, rel=SAME)


def test_two_processes_of_the_full_recipe_run_fused_as_one_runs_stock(train):
    stock = train("full_finetune_single_device", False, batch_size=2)
    fused = train(
        "full_finetune_distributed", True, processes=2, enable_activation_checkpointing=True
    )
    assert len(stock) == 6
    assert fused == pytest.approx(stock, rel=SAME)


def test_two_processes_of_the_lora_recipe_run_fused(train):
    stock = train("lora_finetune_distributed", False, processes=2)
    fused = train("lora_finetune_distributed", True, processes=2)
    assert len(stock) == 6
    assert fused == pytest.approx(stock, rel=SAME)


# A rounding of bf16, for what other orders of sums become in six steps (1.2e-3 was seen).
IN_BF16 = 2**-8


def test_preference_optimization_runs_fused(train, pairs, tmp_path):
    """The same model, with its adapters and without, gives both of the logits that DPO compares."""
    question = [{"role": "user", "content": pair["instruction"]} for pair in pairs]
    answer = [{"role": "assistant", "content": pair["output"]} for pair in pairs]
    rows = [
        {"chosen": [asked, good], "rejected": [asked, bad]}
        for asked, good, bad in zip(question, answer, answer[::-1], strict=True)
    ]
    (tmp_path / "preferences.json").write_text(json.dumps(rows))
    overrides = {
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"},
        "dataset._component_": "torchtune.datasets.preference_dataset",
        "dataset.data_files": str(tmp_path / "preferences.json"),
    }
    stock = train("lora_dpo_single_device", False, **overrides)
    assert stock[-1] != stock[0]
    fused = train("lora_dpo_single_device", True, **overrides)
    assert fused == pytest.approx(stock, rel=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("teacher", ["stock", "fused"])
def test_knowledge_distillation_runs_fused(train, teacher):
    """Both of its losses are computed from the same outputs."""
    recipe = "knowledge_distillation_single_device"
    overrides = {
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
        "kd_ratio": 0.5,
        "teacher_model": {"_component_": BUILDERS["full"], **TINY},
        "teacher_checkpointer": "${checkpointer}",
    }
    stock = train(recipe, False, kind="lora", **overrides)
    if teacher == "fused":
        overrides["teacher_model"] = {**TINY, "_component_": FUSED, "builder": BUILDERS["full"]}
    fused = train(recipe, True, kind="lora", **overrides)
    assert fused == pytest.approx(stock, rel=1e-5)  # fp32 sums in another order


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "option"), CASES)
def test_every_option_runs_fused_on_a_gpu(train, kind, option):
    assert load_kernels()
    recipe = f"{kind}_finetune_single_device"
    stock = train(recipe, False, device="cuda", **OPTIONS[option])
    fused = train(recipe, True, device="cuda", **OPTIONS[option])
    assert fused == pytest.approx(stock, rel=IN_BF16)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", BUILDERS)
def test_two_gpus_run_fused_as_they_run_stock(train, kind):
    recipe = f"{kind}_finetune_distributed"
    stock = train(recipe, False, processes=2, device="cuda")
    fused = train(recipe, True, processes=2, device="cuda")
    assert len(stock) == 6
    assert fused == pytest.approx(stock, rel=IN_BF16)
