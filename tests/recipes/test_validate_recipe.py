import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config as torchtune_config

from torchtune_fused.recipes.validate import main

RECIPE = "torchtune_fused/recipes/validate.py"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/validate.yaml"))
MODEL = {
    "_component_": "torchtune.models.llama3_2.llama3_2",
    "vocab_size": 101,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 80,
    "max_seq_len": 32,
}
MODULES = ["sa_norm", "attn", "mlp_norm", "mlp"]
RUNS = ["forward", "prefill", "decode", "generate"]

# A model with a layer whose feed-forward has a builder of its own, which gets it wrong.
WRONG_PACKAGE = """\
from torch import nn
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import FeedForward
from torchtune_fused import register_builder


class OtherFeedForward(FeedForward):
    pass


class WrongFeedForward(OtherFeedForward):
    def forward(self, x):
        return super().forward(x) * 1.05


@register_builder(OtherFeedForward)
def build(module):
    return WrongFeedForward(
        gate_proj=module.w1, down_proj=module.w2, up_proj=module.w3, activation=module.activation
    )


def model(**sizes):
    decoder = llama3_2(**sizes)
    decoder.layers[1].mlp.__class__ = OtherFeedForward
    return decoder
"""

# A model with sliding windows, which torchtune's attention has not.
WINDOWED_PACKAGE = """\
from torchtune.models.llama3_2 import llama3_2
from torchtune_fused.modules import FusedAttention


def model(**sizes):
    decoder = llama3_2(**sizes)
    for layer in decoder.layers:
        layer.attn = FusedAttention.from_stock(layer.attn)
        layer.attn.sliding_window = 4
    return decoder
"""


@pytest.fixture
def config(tmp_path):
    """A config of a tiny model with random weights."""
    settings = OmegaConf.load(CONFIGS[0])
    settings.merge_with(
        {
            "checkpoint": None,
            "device": "cpu",
            "dtype": "fp32",
            "batch_size": 2,
            "seq_len": 9,
            "new_tokens": 3,
            "rounds": 1,
            "output_dir": str(tmp_path / "out"),
        }
    )
    settings.model = MODEL
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(settings, path)
    return path


@pytest.fixture
def recipe(config, monkeypatch, capsys):
    """Run the recipe in this process; returns its status, and what it wrote."""

    def run(*overrides, config=config):
        monkeypatch.setattr("sys.argv", ["validate.py", "--config", str(config), *overrides])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code, capsys.readouterr().out

    return run


def tune_run(*arguments, folder):
    return subprocess.run(
        [Path(sys.executable).with_name("tune"), "run", RECIPE, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def names(out):
    """The first word of each row of the table of errors."""
    return [line.split()[0] for line in out.splitlines() if re.search(r"\de[+-]\d\d", line)]


def test_a_run_prints_the_table_and_writes_a_trace_that_names_our_ops(config, tmp_path):
    run = tune_run("--config", config, "profile=true", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    kinds = [re.sub(r"\.\d\b", ".*", name) for name in names(run.stdout)]
    layer = [*(f"layers.*.{module}" for module in MODULES), "layers.*"]
    assert kinds == [*layer, "norm", *RUNS]
    assert "argmax as stock: 100.00%" in run.stdout
    for work in ("forward", "prefill", "decode step", "generate step"):
        assert re.search(rf"^{work} +-?[\d.]+ +-?[\d.]+ +-?[\d.]+x$", run.stdout, re.MULTILINE)
    assert "no NVTX ranges are marked: they need a GPU" in run.stdout
    assert run.stdout.endswith("as exact as stock\n")
    events = json.loads((tmp_path / "out/trace.json").read_text())["traceEvents"]
    named = {event.get("name") for event in events}
    ops = ("rms_norm", "rotary_self_attention", "attention_decode", "gated_mlp")
    assert {f"torchtune_fused::{op}" for op in ops} <= named
    assert {"stock decode", "fused decode"} <= named


def test_a_wrong_module_is_named_and_is_exit_status_1(config, tmp_path):
    (tmp_path / "wrong_package.py").write_text(WRONG_PACKAGE)
    override = "model._component_=wrong_package.model"
    run = tune_run("--config", config, override, folder=tmp_path)
    assert run.returncode == 1
    failed = ["layers.1.mlp", "layers.1", *RUNS]
    last = run.stderr.splitlines()[-1]
    assert last == f"less exact than stock: {', '.join(failed)}"
    failing_lines = [line for line in run.stdout.splitlines() if "FAIL" in line]
    assert [line.split()[0] for line in failing_lines] == failed
    assert "as exact as stock" not in run.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_validated_too(recipe, dtype):
    status, out = recipe(f"dtype={dtype}")
    assert status in (0, None)
    assert names(out)[-4:] == RUNS


def test_every_layer_can_be_printed(recipe):
    status, out = recipe("every_layer=true")
    assert status in (0, None)
    layers = [f"layers.{i}{part}" for i in range(3) for part in [*(f".{m}" for m in MODULES), ""]]
    assert names(out) == [*layers, "norm", *RUNS]


def test_a_config_that_trains_fused_is_validated_as_it_is(recipe):
    builder = MODEL["_component_"]
    status, out = recipe("model=torchtune_fused.fused_model", f"model.builder={builder}")
    assert status in (0, None)
    assert names(out)[-4:] == RUNS


def test_attention_that_stock_cannot_have_is_said_not_to_be_compared(recipe, tmp_path, monkeypatch):
    (tmp_path / "windowed_package.py").write_text(WINDOWED_PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    status, out = recipe("model._component_=windowed_package.model")
    assert status in (0, None)
    assert "not compared: 3 attentions" in out
    assert not [name for name in names(out) if name.endswith("attn")]


def test_a_checkpoint_is_validated_with_its_weights(recipe, smollm2):
    status, out = recipe(
        *(f"checkpoint={smollm2}", "device=cpu", "batch_size=1", "seq_len=5", "new_tokens=2"),
        "rounds=1",
        config="smollm2_135m/validate",
    )
    assert status in (0, None)
    assert names(out)[-4:] == RUNS
    assert "worst of 30" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint=/nowhere", "/nowhere: no such folder"),
        ("model=null", "checkpoint and model are both null"),
        ("model=no.such.model", "Error loading 'no.such.model'"),
        ("model=torch.nn.Identity", "expected a torchtune TransformerDecoder, got Identity"),
        ("device=tpu", "device=tpu"),
        ("dtype=fp7", "fp7"),
        ("profile=ture", "profile must be true or false, got 'ture'"),
        ("dtype=fp64", "no truth in a wider dtype"),
        ("seed=x", "seed must be an integer from 0"),
        ("batch_size=0", "batch_size must be an integer >= 1, got 0"),
        ("seq_len=2.5", "seq_len must be an integer >= 1, got 2.5"),
        ("new_tokens=many", "new_tokens must be an integer >= 1, got 'many'"),
        ("rounds=true", "rounds must be an integer >= 1, got True"),
        ("seq_len=30", "exceed the model's max_seq_len of 32"),
        ("sequence_length=30", "the config has no 'sequence_length'"),
    ],
)
def test_bad_values_end_in_one_line(recipe, override, message):
    status, _ = recipe(override)
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert message in status
    assert "\n" not in status


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_config_is_complete(path):
    config = OmegaConf.load(path)
    assert config.keys() == OmegaConf.load(CONFIGS[0]).keys()
    if config.model is None:
        return
    with torch.device("meta"):
        model = torchtune_config.instantiate(config.model)
    assert model.max_seq_len >= config.seq_len + config.new_tokens
