"""Tiny models with a tokenizer of their own, small data, and a way to run a training recipe."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtune_fused.demo_data import docstrings

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What torchtune's alpaca_dataset puts before each question.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n\n\n### Response:\n"
)
SIZES = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
}
WIDE = {"hidden_size": 256, "intermediate_size": 384, "initializer_range": 0.05}


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """Questions and answers: 40 short ones of the standard library's documentation."""
    pairs = sorted(docstrings(), key=lambda pair: len(pair["output"]))[:40]
    return [{"instruction": pair["input"], "output": pair["output"]} for pair in pairs]


@pytest.fixture(scope="session")
def data(pairs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.json"
    path.write_text(json.dumps(pairs))
    return path


@pytest.fixture(scope="session")
def tiny_models(pairs, tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that transformers wrote: heads tied or not, or biases; and their tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [ALPACA_PROMPT, *(text for pair in pairs for text in pair.values())]
    tokenizer.train_from_iterator(texts, trainer)
    folders = {}
    configs = {
        "tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        "untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
        "biased": transformers.Qwen2Config(**SIZES, tie_word_embeddings=False),
        # With heads that the kernels take, for tests on a GPU.
        "wide": transformers.LlamaConfig(**{**SIZES, **WIDE}, tie_word_embeddings=True),
    }
    for name, config in configs.items():
        folder = folders[name] = tmp_path_factory.mktemp("models") / name
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases of 0 would be ones that may be left out
                torch.nn.init.normal_(parameter, mean=parameter[0].item(), std=0.1)
        model.save_pretrained(folder)
        tokenizer.save(str(folder / "tokenizer.json"))
        described = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folders


@pytest.fixture
def settings(tiny_models, data, tmp_path):
    """Overrides that make a training recipe run on a tiny model."""

    def settings(model="tied", **overrides):
        values = {
            "checkpoint": tiny_models[model],
            "tokenizer.max_seq_len": 192,
            "dataset": "torchtune.datasets.alpaca_dataset",
            "dataset.source": "json",
            "dataset.data_files": data,
            "dataset.split": "train",
            "device": "cpu",
            "dtype": "fp32",
            "epochs": 1,
            "optimizer.lr": "2e-3",
            "lr_scheduler.num_warmup_steps": 2,
            "output_dir": tmp_path / "out",
            **overrides,
        }
        return [f"{key}={value}" for key, value in values.items()]

    return settings


@pytest.fixture
def run_recipe(monkeypatch, capsys):
    """Run a recipe in this process; returns its exit status, and what it wrote."""

    def run(recipe, *overrides, config=None):
        main = import_module(f"torchtune_fused.recipes.{recipe}").main
        config = config or f"smollm2_135m/{recipe}"
        arguments = [f"{recipe}.py", "--config", str(config), *overrides]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().out

    return run


@pytest.fixture
def start_recipe(tmp_path):
    """Start a recipe by `tune run`, in processes of its own."""

    def start(recipe, *overrides, processes=1):
        # Without a port of its own, a run beside it would be taken for a part of it.
        torchrun = ["--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
        path = f"torchtune_fused/recipes/{recipe}.py"
        tune = [sys.executable, "-m", "torchtune._cli.tune"]  # wherever pip put its script
        return subprocess.Popen(
            [*tune, "run", *torchrun, path, "--config", f"smollm2_135m/{recipe}", *overrides],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


@pytest.fixture
def kill_at(start_recipe, tmp_path):
    """Kill a run as soon as a path below tmp_path is there."""

    def kill_at(path, recipe, *overrides):
        run = start_recipe(recipe, *overrides)
        while not (tmp_path / path).exists() and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert run.returncode == -signal.SIGKILL

    return kill_at


@pytest.fixture
def losses():
    """Loss of each step that a run logged to a folder; of a step that was done twice, the last."""

    def read(folder):
        text = (folder / "metrics.txt").read_text()
        return {int(step): float(x) for step, x in re.findall(r"Step (\d+) \| loss:(\S+)", text)}

    return read
