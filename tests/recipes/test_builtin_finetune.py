"""torchtune's own fine-tuning recipes, on the real SmolLM2 and real text, stock and fused."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 6
CONFIG = """\
output_dir: {output_dir}
model:
  _component_: {builder}
  vocab_size: 49152
  num_layers: 30
  num_heads: 9
  num_kv_heads: 3
  embed_dim: 576
  intermediate_dim: 1536
  max_seq_len: 512
  rope_base: 100000
  scale_factor: 1
  norm_eps: 1.0e-05
{adapters}
tokenizer:
  _component_: torchtune_fused.generation.tokenizer.HFTokenizer
  path: {checkpoint}
  max_seq_len: 96
dataset:
  _component_: torchtune.datasets.alpaca_dataset
  source: json
  data_files: {data}
  split: train
  packed: False
seed: 7
shuffle: True
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {checkpoint}
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${{output_dir}}
  model_type: LLAMA3
resume_from_checkpoint: False
batch_size: 1
epochs: 1
max_steps_per_epoch: {steps}
optimizer:
  _component_: torch.optim.AdamW
  lr: {lr}
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 1
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
gradient_accumulation_steps: 1
optimizer_in_bwd: False
clip_grad_norm: null
compile: False
device: cpu
dtype: fp32
enable_activation_checkpointing: False
enable_activation_offloading: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${{output_dir}}
  filename: losses.txt
log_every_n_steps: 1
log_peak_memory_stats: False
"""
ADAPTERS = """\
  lora_attn_modules: [q_proj, v_proj, output_proj]
  apply_lora_to_mlp: True
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
"""


@pytest.fixture(scope="module")
def docstrings(tmp_path_factory) -> Path:
    """Questions and answers made of the standard library's own documentation."""
    pairs = []
    for module in map(importlib.import_module, ("os.path", "textwrap", "statistics", "shutil")):
        for name in sorted(getattr(module, "__all__", dir(module))):
            answer = inspect.getdoc(getattr(module, name, None))
            if answer and inspect.isroutine(getattr(module, name)):
                question = f"What does {module.__name__}.{name} do in Python?"
                pairs.append({"instruction": question, "input": "", "output": answer})
    path = tmp_path_factory.mktemp("data") / "docstrings.json"
    path.write_text(json.dumps(pairs))
    return path


def losses(recipe: str, folder: Path, overrides: tuple[str, ...] = (), **config) -> list[float]:
    folder.mkdir()
    file = folder / "config.yaml"
    file.write_text(CONFIG.format(output_dir=folder, steps=STEPS, **config))
    tune = Path(sys.executable).with_name("tune")
    done = subprocess.run(
        [tune, "run", recipe, "--config", file, *overrides],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(x) for x in re.findall(r"loss:([\d.]+)", (folder / "losses.txt").read_text())]


@pytest.mark.parametrize(
    ("recipe", "builder", "adapters", "lr"),
    [
        ("full_finetune_single_device", "llama3_2", "", 2e-5),
        ("lora_finetune_single_device", "lora_llama3_2", ADAPTERS, 1e-3),
    ],
)
def test_builtin_recipe_trains_the_same_with_three_lines_changed(
    recipe, builder, adapters, lr, smollm2, docstrings, tmp_path
):
    builder = f"torchtune.models.llama3_2.{builder}"
    config = {"builder": builder, "adapters": adapters, "lr": lr}
    config |= {"checkpoint": smollm2, "data": docstrings}
    fused_lines = (
        "model=torchtune_fused.fused_model",
        f"model.builder={builder}",
        "loss=torchtune_fused.modules.CEWithChunkedOutputLoss",
        "optimizer=torchtune_fused.AdamW",
    )
    stock = losses(recipe, tmp_path / "stock", **config)
    fused = losses(recipe, tmp_path / "fused", fused_lines, **config)
    assert len(stock) == len(fused) == STEPS
    assert stock[-1] < stock[0]
    # fp32 sums in another order, carried through six AdamW steps: AdamW divides by the root of a
    # near-zero second moment at first, which turns an ulp of gradient into up to lr of weight.
    assert fused == pytest.approx(stock, rel=1e-4)
