import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file

RECIPE = "lora_finetune"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob(f"*/{RECIPE}.yaml"))
# What BLAS makes of another alignment of the same weights, or of another order of sums.
SAME = 2e-6
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def train(run_recipe, settings, losses, tmp_path):
    """Train a tiny model for eight steps in this process; returns the losses."""

    def train(folder="out", **overrides):
        values = {
            "max_steps_per_epoch": 8,
            "optimizer.lr": 1e-2,
            "output_dir": tmp_path / folder,
            **overrides,
        }
        status, _ = run_recipe(RECIPE, *settings(**values))
        assert status in (0, None)
        return losses(tmp_path / folder)

    return train


def test_a_killed_run_goes_on_with_the_same_dropout(train, kill_at, settings, tmp_path):
    overrides = {"lora.lora_dropout": 0.3, "save_adapter_weights_only": True}
    whole = train("whole", **overrides)
    assert whole != train("no dropout")
    overrides |= {"max_steps_per_epoch": 8, "optimizer.lr": 1e-2, "save_every_n_steps": 3}
    kill_at("out/step_6", RECIPE, *settings(**overrides))
    assert train(resume=True, **overrides) == pytest.approx(whole, rel=SAME)
    files = sorted(path.name for path in (tmp_path / "out/step_8").iterdir())
    assert files == ["adapter", "training_state.pt"]


def test_two_processes_train_like_one(train, start_recipe, settings, losses, tmp_path):
    one = train("one")
    overrides = {"max_steps_per_epoch": 8, "optimizer.lr": 1e-2, "save_every_n_steps": 4}
    run = start_recipe(RECIPE, *settings(**overrides, batch_size=2), processes=2)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    assert losses(tmp_path / "out") == pytest.approx(one, rel=1e-5)  # other sums in the norm
    shutil.rmtree(tmp_path / "out/step_8")
    assert train(resume=True, save_every_n_steps=4) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("head", ["tied", "untied", "biased"])
def test_adapters_fit_the_base_model_as_peft_applies_them(head, train, tiny_models, tmp_path):
    train(checkpoint=tiny_models[head], **{"lora.apply_lora_to_output": head != "tied"})
    folder = tmp_path / "out/step_8"
    described = json.loads((folder / "adapter/adapter_config.json").read_text())
    targets = PROJECTIONS | ({"lm_head"} if head != "tied" else set())
    assert set(described["target_modules"]) == targets
    assert described["peft_type"] == "LORA"
    assert described["base_model_name_or_path"] == str(tiny_models[head])
    adapter = load_file(folder / "adapter/adapter_model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[head])
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(2, 100)[None]
    with torch.no_grad():
        before = base(tokens).logits
        # What peft 0.21 does with these files: W + (alpha / r) B A, by the names of the modules.
        for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
            module = base.get_submodule(
                name.removeprefix("base_model.model.")[: -len(".lora_A.weight")]
            )
            product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
            module.weight += described["lora_alpha"] / described["r"] * product
        assert len(adapter) == 2 * (2 * len(PROJECTIONS) + (head != "tied"))
        after = base(tokens).logits
        # fp32: the product of the adapter's matrices is summed in another order.
        torch.testing.assert_close(merged(tokens).logits, after, rtol=0, atol=1e-5)
        assert (after - before).abs().max() > 0.1


def test_adapters_alone_are_not_for_generate(train, run_recipe, tmp_path):
    train(max_steps_per_epoch=1, save_adapter_weights_only=True)
    for folder in (tmp_path / "out/step_1", tmp_path / "out/step_1/adapter"):
        status, _ = run_recipe("generate", f"checkpoint={folder}")
        assert status.startswith(f"error: {folder}: the folder holds LoRA adapters without their m")


def test_only_adapters_are_trained(train, tiny_models, tmp_path):
    """What LoRA leaves alone is saved as it was."""
    train()
    before = load_file(tiny_models["tied"] / "model.safetensors")
    after = load_file(tmp_path / "out/step_8/model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        adapted = name.split(".")[-2] in PROJECTIONS
        assert before[name].equal(after[name]) is not adapted, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.lora_attn_modules": "[q_proj,z_proj]"}, "attention has no 'z_proj'; it has q_proj"),
        ({"lora.lora_attn_modules": "[]", "lora.apply_lora_to_mlp": False}, "to no module"),
        ({"lora.apply_lora_to_output": True}, "the head of this model is its embedding"),
        ({"lora": None}, "lora must be a section of the config, got None"),
        ({"lora.lora_attn_modules": "q_proj"}, "lora_attn_modules must be a list, got 'q_proj'"),
        ({"lora.apply_lora_to_mlp": "flase"}, "apply_lora_to_mlp must be true or false"),
        ({"lora.lora_rank": 0}, "lora_rank must be an integer >= 1, got 0"),
        ({"lora.lora_alpha": 0}, "lora_alpha must be a number above 0, got 0"),
        ({"lora.lora_alpha": "big"}, "lora_alpha must be a number above 0, got 'big'"),
        ({"save_adapter_weights_only": "yes please"}, "save_adapter_weights_only must be true or"),
        ({"lora.lora_dropout": 1}, "lora_dropout must be from 0 to below 1, got 1"),
        ({"lora.use_dora": True}, "DoRA is not supported"),
        ({"lora.colour": "red"}, "lora: got an unexpected keyword argument 'colour'"),
        ({"checkpoint": "/nowhere"}, "/nowhere: no such folder"),
    ],
)
def test_bad_configs_end_in_one_line_before_weights_are_read(
    run_recipe, settings, tiny_models, overrides, message, tmp_path
):
    folder = shutil.copytree(tiny_models["tied"], tmp_path / "without_weights")
    (folder / "model.safetensors").unlink()
    status, _ = run_recipe(RECIPE, *settings(**{"checkpoint": folder, **overrides}))
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert message in status
    assert "\n" not in status


def test_a_full_run_or_another_rank_is_not_continued(train, run_recipe, settings):
    train(max_steps_per_epoch=1)
    for recipe, overrides, message in (
        ("full_finetune", {}, "its recipe was lora_finetune, and is full_finetune now"),
        (RECIPE, {"lora.lora_rank": 2}, "its lora.lora_rank was 16, and is 2 now"),
    ):
        values = {"max_steps_per_epoch": 1, "resume": True, **overrides}
        status, _ = run_recipe(recipe, *settings(**values))
        assert f"can't be resumed: {message}" in status


def test_another_base_is_not_trained_on(train, run_recipe, settings, tiny_models, tmp_path):
    """Its adapters would fit, and mean nothing."""
    train(max_steps_per_epoch=1)
    other = shutil.copytree(tiny_models["tied"], tmp_path / "other")
    overrides = {"max_steps_per_epoch": 1, "resume": True, "checkpoint": other}
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert "can't be resumed: its model.name was tied, and is other now" in status


def test_a_checkpoint_without_its_adapter_is_named(train, run_recipe, settings, tmp_path):
    train(max_steps_per_epoch=1, epochs=1)
    adapter = tmp_path / "out/step_1/adapter/adapter_model.safetensors"
    overrides = {"max_steps_per_epoch": 1, "epochs": 2, "optimizer.lr": 1e-2, "resume": True}
    adapter.write_bytes(b"cut")
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert f"{adapter}: not a safetensors file" in status
    adapter.unlink()
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert str(adapter) in status


def test_help_explains_every_key(run_recipe):
    config = OmegaConf.load(CONFIGS[0])
    full = OmegaConf.load(CONFIGS[0].with_name("full_finetune.yaml"))
    status, out = run_recipe(RECIPE, "--help")
    assert status in (0, None)
    assert "as of full_finetune" in out
    for key in [*(config.keys() - full.keys()), *config.lora]:
        assert key in out
