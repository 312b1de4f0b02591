"""What holds for both fine-tuning recipes."""

from pathlib import Path

import pytest

RECIPES = ("full_finetune", "lora_finetune")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*/*_finetune.yaml"))
# What BLAS makes of another alignment of the same weights, or of another order of sums.
SAME = 2e-6


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config_is_complete(run_recipe, settings, config, tmp_path):
    """Each runs as it is, once its folder is filled and its data is there."""
    overrides = {"max_steps_per_epoch": 1, "gradient_accumulation_steps": 1}
    status, _ = run_recipe(config.stem, *settings(**overrides), config=config)
    assert status in (0, None)
    assert (tmp_path / "out/step_1/model.safetensors").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch": False},
        {"batch_size": 1, "gradient_accumulation_steps": 4},
        {"enable_activation_checkpointing": True},
        {"compile": True},
        {"optimizer_in_bwd": True, "clip_grad_norm": None},
        {"loss": "torch.nn.CrossEntropyLoss"},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
@pytest.mark.parametrize("recipe", RECIPES)
def test_options_that_save_time_or_memory_leave_the_losses(
    run_recipe, settings, losses, recipe, overrides, monkeypatch, tmp_path
):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # all but the C++ compiler's minute

    def train(folder, **overrides):
        values = {"max_steps_per_epoch": 8, "output_dir": tmp_path / folder, **overrides}
        assert run_recipe(recipe, *settings(**values))[0] in (0, None)
        return losses(tmp_path / folder)

    plain = {key: value for key, value in overrides.items() if key == "clip_grad_norm"}
    assert train("with", **overrides) == pytest.approx(train("plain", **plain), rel=SAME)
