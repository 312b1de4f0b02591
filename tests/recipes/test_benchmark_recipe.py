import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from omegaconf import OmegaConf

from torchtune_fused.benchmarks.setting import Setting
from torchtune_fused.recipes.benchmark import SECTIONS, main

RECIPE = "torchtune_fused/recipes/benchmark.py"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/benchmark.yaml"))
SIZES = {
    "vocab_size": 101,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 80,
    "max_seq_len": 64,
}
ADAPTERS = {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4, "lora_alpha": 8}
MODELS = "torchtune.models.llama3_2"
CONTESTS = {  # by section: what it is called, and the tokens of a run
    "decode": ("decode 2 x 8 after 9", 2),
    "prefill": ("prefill 2 x 32", 64),
    "train": ("train 2 x 16", 32),
    "packed": ("train packed 3 x 8", 24),
    "lora": ("LoRA 1 x 16", 16),
}


@pytest.fixture
def config(tmp_path):
    """A config of a tiny model with random weights, and all sections that need no checkpoint."""
    settings = OmegaConf.load(CONFIGS[0])
    settings.merge_with(
        {
            "checkpoint": None,
            "device": "cpu",
            "dtype": "fp32",
            "peers": ["torchtune", "transformers", "transformers + Liger"],
            "rounds": 3,
            "top_k": 30,
            "output": str(tmp_path / "out/report.json"),
            "decode": {"new_tokens": 8},
            "train": {},
            "packed": {},
        }
    )
    settings.sections = list(CONTESTS)
    settings.model = {"_component_": f"{MODELS}.llama3_2", **SIZES}
    settings.lora.model = {"_component_": f"{MODELS}.lora_llama3_2", **SIZES, **ADAPTERS}
    shapes = {"decode": [2, 9], "prefill": [2, 32], "train": [2, 16], "packed": [3, 8]}
    for section, shape in {**shapes, "lora": [1, 16]}.items():
        settings[section].shapes = [shape]
    path = tmp_path / "tiny.yaml"
    OmegaConf.save(settings, path)
    return path


@pytest.fixture
def recipe(config, monkeypatch, capsys):
    """Run the recipe in this process; returns its status, what it printed, and its report."""

    def run(*overrides):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--config", str(config), *overrides])
        with pytest.raises(SystemExit) as exit:
            main()
        path = config.parent / "out/report.json"
        report = json.loads(path.read_text()) if path.exists() else None
        return exit.value.code, capsys.readouterr().out, report

    return run


def test_a_run_prints_tables_and_writes_a_report_and_a_picture(config, tmp_path):
    run = subprocess.run(
        [Path(sys.executable).with_name("tune"), "run", RECIPE, "--config", config],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [c["section"] for c in report["contests"]] == list(CONTESTS)
    for contest in report["contests"]:
        assert (contest["work"], contest["tokens"]) == CONTESTS[contest["section"]]
        assert f"{contest['work']} (systems ran in turns)" in run.stdout
        assert {"torchtune", "torchtune-fused"} <= contest["systems"].keys()
        for name in (*contest["systems"], *contest["skipped"]):
            assert f"\n  {name} " in run.stdout
    train = report["contests"][2]
    assert train["systems"].keys() == {"torchtune", "transformers", "torchtune-fused"}
    assert "not installed" in train["skipped"]["transformers + Liger"] or (
        "need a GPU" in train["skipped"]["transformers + Liger"]
    )
    picture = tmp_path / "out/report.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert run.stdout.endswith(f"written to {tmp_path / 'out/report.json'} and {picture}\n")


def test_figures_agree_with_each_other(recipe):
    status, _, report = recipe("sections=[decode,train]")
    assert status in (0, None)
    decode, train = report["contests"]
    assert decode["flops"] is None and train["moved_bytes"] is None
    # Weights but not the rows of an embedding (here the head too); K and V of 9 + 8 / 2 slots.
    matrices = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 80
    weights = 101 * 64 + 2 * (matrices + 2 * 64) + 64
    assert decode["moved_bytes"] == 4 * (weights + 2 * 2 * (2 * 32) * 13)
    for contest in (decode, train):
        assert contest["roof"]["tokens_per_second"] == pytest.approx(
            contest["tokens"] / contest["roof"]["seconds"]
        )
        first = next(iter(contest["systems"].values()))
        for figures in contest["systems"].values():
            assert len(figures["rounds"]) == 3
            assert figures["seconds"] == median(figures["rounds"])
            rate = contest["tokens"] / figures["seconds"]
            assert figures["tokens_per_second"] == pytest.approx(rate)
            assert figures["of_roof"] == pytest.approx(rate / contest["roof"]["tokens_per_second"])
            assert figures["ratio"] == pytest.approx(rate / first["tokens_per_second"])
            assert figures["mfu"] is None and figures["peak_bytes"] is None  # this is a CPU


def test_a_report_says_what_its_figures_depend_on(recipe):
    _, _, report = recipe("sections=[prefill]")
    assert report["model"] == f"{MODELS}.llama3_2"
    assert report["dtype"] == "float32"
    assert report["config"]["prefill"]["shapes"] == [[2, 32]]
    environment = report["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["torchtune"] == "0.6.1"
    assert {"liger-kernel", "transformers", "triton"} <= environment["versions"].keys()
    assert {"device", "cuda", "kernels", "commit", "command", "date"} <= environment.keys()


def test_only_the_peers_asked_for_run(recipe):
    _, out, report = recipe("sections=[train]", "peers=[transformers]")
    assert report["contests"][0]["systems"].keys() == {"transformers", "torchtune-fused"}
    assert "torchtune compiled" not in out


def test_a_missing_peer_is_skipped_with_the_reason(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, report = recipe("sections=[train]", "peers=[torchtune,transformers]")
    assert status in (0, None)
    (contest,) = report["contests"]
    assert contest["systems"].keys() == {"torchtune", "torchtune-fused"}
    assert contest["skipped"]["transformers"].startswith("not installed: ")
    assert re.search(r"^  transformers +skipped: not installed: ", out, re.MULTILINE)


def test_a_peer_without_such_a_model_is_skipped_with_the_reason(recipe):
    status, _, report = recipe(
        "sections=[train]", "model._component_=torchtune.models.qwen2.qwen2", "peers=[transformers]"
    )
    assert status in (0, None)
    assert "no biases of q, k and v" in report["contests"][0]["skipped"]["transformers"]


def test_if_we_fail_the_others_have_their_figures_and_the_exit_status_is_1(recipe):
    status, _, report = recipe("sections=[train,prefill]", "loss._component_=torch.nn.L1Loss")
    assert status.startswith("no figures of train 2 x 16, torchtune-fused: RuntimeError: ")
    train, prefill = report["contests"]
    assert train["systems"].keys() == {"torchtune", "transformers"}
    assert prefill["systems"].keys() == {"torchtune", "torchtune-fused"}


def test_where_nobody_has_figures_there_is_no_picture_and_the_reason_is_said(recipe, tmp_path):
    status, out, report = recipe("sections=[train]", "loss._component_=torch.nn.L1Loss", "peers=[]")
    assert status.startswith("no figures of train 2 x 16, torchtune-fused: RuntimeError: ")
    assert "skipped: RuntimeError" in out
    assert report["contests"][0]["systems"] == {}
    assert not (tmp_path / "out/report.png").exists()


def test_without_matplotlib_the_report_is_written_and_the_plot_is_said_to_be_missing(
    recipe, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, report = recipe("sections=[prefill]")
    assert status in (0, None)
    assert len(report["contests"]) == 1
    assert out.endswith("no plot: pip install 'torchtune-fused[plot]'\n")


def test_output_can_be_switched_off(recipe):
    status, out, report = recipe("sections=[prefill]", "output=null")
    assert status in (0, None)
    assert report is None
    assert "written" not in out


def test_loading_is_measured_in_fresh_processes(recipe, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "m")
    status, out, report = recipe(
        *("sections=[first_token]", "peers=[transformers]"),
        *("rounds=1", f"checkpoint={tmp_path / 'm'}", "model=null"),
    )
    assert status in (0, None), out
    (contest,) = report["contests"]
    assert contest["systems"].keys() == {"transformers", "torchtune-fused"}
    assert contest["roof"] is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sections=[decode,dream]", "sections: there is no 'dream', only decode, prefill"),
        ("sections=[]", "sections is empty"),
        ("sections=decode", "sections must be a list of decode, prefill"),
        ("peers=[vllm]", "peers: there is no 'vllm', only torchtune"),
        ("seed=x", "seed must be an integer from 0 to 2**32 - 1, got 'x'"),
        ("temperature=hot", "temperature must be a finite number >= 0, got 'hot'"),
        ("top_k=0", "top_k must be an integer >= 1"),
        ("rounds=0", "rounds must be an integer >= 1, got 0"),
        ("sections=[first_token]", "first_token loads a checkpoint: set checkpoint to a folder"),
        ("checkpoint=/nowhere", "/nowhere: no such file or folder"),
        ("model=null", "checkpoint and model are both null"),
        ("model=no.such.model", "Error loading 'no.such.model'"),
        ("model=torch.nn.Identity", "expected a torchtune TransformerDecoder, got Identity"),
        ("model.wheels=4", "unexpected keyword argument 'wheels'"),
        ("loss._component_=no.such.loss", "Error loading 'no.such.loss'"),
        ("loss=null", "loss must name a component, got None"),
        ("device=tpu", "device=tpu"),
        ("dtype=fp7", "fp7"),
        ("train.shapes=[2,16]", "train.shapes must list [batch size, tokens] pairs"),
        ("train.shapes=[[2,0]]", "train.shapes must be an integer >= 1, got 0"),
        ("train.shapes=[[1,65]]", "65 tokens exceed the model's max_seq_len of 64"),
        ("decode.new_tokns=4", "decode has no 'new_tokns', only shapes, new_tokens or model"),
        ("decode.new_tokens=1", "decode.new_tokens must be at least 2"),
        ("decode.new_tokens=60", "69 tokens exceed the model's max_seq_len of 64"),
        ("lora.model=null", "section lora needs lora.model"),
        ("lora.model._component_=torchtune_fused.fused_model", "'builder'"),
        ("packed=null", "the config has no 'packed'"),
        ("output=/dev/null/report.json", "File exists: '/dev/null'"),
        ("output=report.txt", "output must be a .json file"),
        ("round=3", "the config has no 'round'"),
    ],
)
def test_bad_values_end_in_one_line_before_anything_is_built(recipe, override, message):
    status, out, report = recipe(override)
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert message in status
    assert "\n" not in status
    assert out == "" and report is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_config_is_complete(path, request):
    config = OmegaConf.load(path)
    help = " ".join(main.__doc__.split())
    for key in config:
        assert key in help
    if config.checkpoint is not None:
        config.checkpoint = str(request.getfixturevalue("smollm2"))
    setting = Setting(config, torch.device("cpu"), torch.float32)
    for section in config.sections:
        contests = list(SECTIONS[section](setting))
        assert contests
        assert all(any(s.ours for s in c.systems) for c in contests)
