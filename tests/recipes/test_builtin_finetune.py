"""torchtune's own fine-tuning recipes, stock and fused by two lines of their config.

Full fine-tuning on the real SmolLM2 and real text; everything else on a tiny model.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune._cli.tune import main as tune

STEPS = 6
SMOLLM2 = """\
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
"""
CONFIG = """\
output_dir: {output_dir}
model:
{model}
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
  lr: 2.0e-5
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


def losses(folder: Path, model: str, checkpoint: Path, data: Path) -> list[float]:
    folder.mkdir()
    config = folder / "config.yaml"
    config.write_text(
        CONFIG.format(output_dir=folder, model=model, checkpoint=checkpoint, data=data, steps=STEPS)
    )
    tune = Path(sys.executable).with_name("tune")
    done = subprocess.run(
        [tune, "run", "full_finetune_single_device", "--config", config],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(x) for x in re.findall(r"loss:([\d.]+)", (folder / "losses.txt").read_text())]


def test_builtin_recipe_trains_the_same_on_fused_modules(smollm2, docstrings, tmp_path):
    builder = "torchtune.models.llama3_2.llama3_2"
    stock = losses(tmp_path / "stock", f"  _component_: {builder}\n{SMOLLM2}", smollm2, docstrings)
    fused = losses(
        tmp_path / "fused",
        f"  _component_: torchtune_fused.fused_model\n  builder: {builder}\n{SMOLLM2}",
        smollm2,
        docstrings,
    )
    assert len(stock) == len(fused) == STEPS
    assert stock[-1] < stock[0]
    # fp32 sums in another order, carried through six AdamW steps: AdamW divides by the root of a
    # near-zero second moment at first, which turns an ulp of gradient into up to lr of weight.
    assert fused == pytest.approx(stock, rel=1e-4)


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
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 4,
    "lora_alpha": 8,
}
SCHEDULE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
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
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # all but the C++ compiler's minute

    def train(recipe, fused, *, processes=1, **overrides):
        checkpoint, folder = tiny_models["tied"], tmp_path / f"{fused}-{processes}"
        text = CONFIG.format(output_dir=folder, model="", checkpoint=checkpoint, data=data, steps=6)
        config = OmegaConf.create(text)
        builder = "torchtune.models.llama3_2.llama3_2"
        sizes = TINY
        if recipe.startswith("lora"):
            builder = "torchtune.models.llama3_2.lora_llama3_2"
            sizes = {**TINY, **LORA}
            config.lr_scheduler = {"_component_": SCHEDULE, "num_warmup_steps": 1}
        component = {"_component_": builder}
        if fused:
            component = {"_component_": "torchtune_fused.fused_model", "builder": builder}
        config.model = {**component, **sizes}
        config.merge_with({"optimizer": {"lr": 2e-3}, "tokenizer": {"max_seq_len": 192}})
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
            script = folder / "on_cpus.py"
            script.write_text(ON_CPUS)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            done = subprocess.run(
                [*torchrun, "--nproc_per_node", str(processes), script, *arguments[1:]],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert done.returncode == 0, done.stderr[-2000:]
        return [float(x) for x in re.findall(r"loss:([\d.]+)", (folder / "losses.txt").read_text())]

    return train


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("recipe", ["full_finetune_single_device", "lora_finetune_single_device"])
def test_every_option_of_the_builtin_recipes_runs_fused(train, recipe, option):
    if recipe.startswith("lora") and option == "in_backward":
        pytest.skip("torchtune's LoRA recipe steps after the backward pass only")
    stock = train(recipe, False, **OPTIONS[option])
    fused = train(recipe, True, **OPTIONS[option])
    assert len(stock) == 6
    assert stock[-1] != stock[0]
    # fp32 sums in another order, carried through six steps.
    assert fused == pytest.approx(stock, rel=1e-5)


def test_two_processes_of_the_full_recipe_run_fused_as_one_runs_stock(train):
    stock = train("full_finetune_single_device", False, batch_size=2)
    fused = train(
        "full_finetune_distributed", True, processes=2, enable_activation_checkpointing=True
    )
    assert len(stock) == 6
    assert fused == pytest.approx(stock, rel=1e-5)


def test_two_processes_of_the_lora_recipe_run_fused(train):
    stock = train("lora_finetune_distributed", False, processes=2)
    fused = train("lora_finetune_distributed", True, processes=2)
    assert len(stock) == 6
    assert fused == pytest.approx(stock, rel=1e-5)
