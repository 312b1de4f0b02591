import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf

RECIPE = "full_finetune"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob(f"*/{RECIPE}.yaml"))
# What BLAS makes of another alignment of the same weights, or of another order of sums.
SAME = 2e-6


@pytest.fixture
def train(run_recipe, settings, losses, tmp_path):
    """Train a tiny model for eight steps in this process; returns the losses."""

    def train(folder="out", **overrides):
        values = {"max_steps_per_epoch": 8, "output_dir": tmp_path / folder, **overrides}
        status, _ = run_recipe(RECIPE, *settings(**values))
        assert status in (0, None)
        return losses(tmp_path / folder)

    return train


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    train, kill_at, settings, losses, tmp_path
):
    whole = train("whole")
    overrides = {"max_steps_per_epoch": 8, "output_dir": tmp_path / "out", "save_every_n_steps": 2}
    kill_at("out/.saving-step_4", RECIPE, *settings(**overrides))
    killed = losses(tmp_path / "out")
    assert max(killed) >= 4
    assert (tmp_path / "out/step_2").is_dir()
    resumed = train(resume=True, save_every_n_steps=2)
    assert resumed == pytest.approx(whole, rel=SAME)
    assert sorted(path.name for path in tmp_path.glob("out/step_*")) == ["step_6", "step_8"]
    assert not list(tmp_path.glob("out/.*"))
    # There is nothing left to do, and that is no error.
    assert train(resume=True, save_every_n_steps=2) == resumed


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_two_processes_train_like_one(train, start_recipe, settings, losses, packed, tmp_path):
    overrides = {
        "dataset.packed": packed,
        "tokenizer.max_seq_len": 400 if packed else 192,
        "epochs": 2,
        "max_steps_per_epoch": 2,
    }
    one = train("one", batch_size=4, **overrides)
    overrides |= {
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "save_every_n_steps": 2,
        "enable_activation_checkpointing": packed,
    }
    run = start_recipe(RECIPE, *settings(**overrides), processes=2)
    _, err = run.communicate(timeout=300)
    assert run.returncode == 0, err[-2000:]
    # The norm that gradients are clipped by is summed in another order: fp32 sums of 16,000
    # squares.
    one = pytest.approx(one, rel=1e-5)
    assert losses(tmp_path / "out") == one
    # One process goes on where two were.
    shutil.rmtree(tmp_path / "out/step_4")
    overrides |= {"batch_size": 2, "resume": True}
    assert train(**overrides) == one


def test_a_row_of_which_all_labels_are_masked_changes_nothing(train):
    """Too long a prompt leaves nothing of the answer; its mean loss alone would be 0/0."""
    found = train(**{"tokenizer.max_seq_len": 60, "batch_size": 1})
    assert 0.0 in found.values()
    assert all(0 <= loss < 10 for loss in found.values())


def test_the_last_checkpoint_is_what_generate_and_transformers_load(train, run_recipe, tmp_path):
    train(lr_scheduler=None, keep_last_n_checkpoints=1, save_every_n_steps=3)
    assert [path.name for path in tmp_path.glob("out/step_*")] == ["step_8"]
    folder = tmp_path / "out/step_8"
    status, out = run_recipe(
        *("generate", f"checkpoint={folder}", "device=cpu", "max_new_tokens=8", "chat=false"),
        "prompt=Return the",
    )
    assert status in (0, None)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer("Return the", return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0]
    answer = tokenizer.decode(tokens[inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert out.startswith(answer)


def test_where_a_run_begins_and_ends_is_said(train, caplog, tmp_path):
    folder = tmp_path / "out"
    for epochs, message in (
        (1, f"no checkpoint to go on from in {folder}: starting at the first step"),
        (2, f"going on from {folder}/step_1: 1 of 2 steps left"),
        (2, f"going on from {folder}/step_2: 0 of 2 steps left"),
    ):
        train(epochs=epochs, max_steps_per_epoch=1, resume=True)
        assert message in caplog.text
        assert f"checkpoint written to {folder}/step_{epochs}" in caplog.text


def test_speed_memory_and_the_config_are_logged(train, tmp_path):
    train(log_every_n_steps=4)
    lines = (tmp_path / "out/metrics.txt").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["Step 4", "Step 8"]
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib"):
        assert all(f"{name}:" in line for line in lines)
    assert all("mfu" not in line for line in lines)  # a CPU has no data sheet
    saved = OmegaConf.load(tmp_path / "out/torchtune_config.yaml")
    assert saved.log_every_n_steps == 4


def test_several_datasets_follow_each_other(data, settings, tmp_path, run_recipe, losses):
    config = OmegaConf.load(CONFIGS[0].parents[1] / f"smollm2_135m/{RECIPE}.yaml")
    part = {"_component_": "torchtune.datasets.alpaca_dataset", "source": "json"}
    part |= {"data_files": str(data), "split": "train"}
    config.dataset = [part, part]
    OmegaConf.save(config, tmp_path / "two.yaml")
    overrides = [text for text in settings(batch_size=40) if not text.startswith("dataset")]
    status, _ = run_recipe(RECIPE, *overrides, config=tmp_path / "two.yaml")
    assert status in (0, None)
    assert len(losses(tmp_path / "out")) == 2


@pytest.fixture
def without_weights(tiny_models, tmp_path):
    """A folder that lacks nothing but the weights: whoever reads them fails."""
    folder = Path(shutil.copytree(tiny_models["tied"], tmp_path / "without_weights"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("checkpoint", "/nowhere", "/nowhere: no such folder"),
        ("tokenizer.path", "/nowhere", "/nowhere: no such folder"),
        ("checkpoint", "null", "checkpoint must be a path, got None"),
        ("output_dir", "null", "output_dir must be a path, got None"),
        ("tokenizer", "null", "tokenizer must name a component, got None"),
        ("tokenizer.max_seq_len", 513, "tokenizer.max_seq_len is 513, but the model's is 512"),
        (
            "tokenizer.max_seq_len",
            0,
            "tokenizer.max_seq_len must be an integer >= 1 or null, got 0",
        ),
        ("tokenizer.max_seq_len", "many", "must be an integer >= 1 or null, got 'many'"),
        ("dataset.data_files", "/nowhere.json", "/nowhere.json"),
        ("dataset.split", "best", "best"),
        ("dataset.column_map", "{instruction: question}", "question"),
        ("dataset.colour", "red", "colour"),
        ("dataset", "torchtune.datasets.no_dataset", "Error loading 'torchtune.datasets.no_d"),
        ("loss", "no.such.Loss", "Error loading 'no.such.Loss'"),
        ("loss", 5, "loss must name a component, got 5"),
        ("loss", "torch.nn.MSELoss", "loss: torch.nn.MSELoss is none: it has no ignore_index"),
        ("loss.num_chunks", 8, "loss: "),
        ("optimizer", "null", "optimizer must name a component, got None"),
        ("optimizer", "torch.optim.NoOptimizer", "Error loading 'torch.optim.NoOptimizer'"),
        ("optimizer", "torch.nn.Linear", "optimizer: "),
        ("optimizer.learning_rate", 1e-3, "optimizer: AdamW.__init__() got an unexpected"),
        ("optimizer.lr", -1, "Invalid learning rate: -1"),
        ("lr_scheduler", "torch.nn.Identity", "lr_scheduler: torch.nn.Identity is not a sched"),
        ("lr_scheduler.warmup", 1, "lr_scheduler: "),
        ("metric_logger", "torch.nn.Identity", "torch.nn.Identity is none: it has no log_config"),
        ("metric_logger", "no.such.Logger", "Error loading 'no.such.Logger'"),
        ("dtype", "fp7", "fp7"),
        ("dtype", "fp16", "dtype=fp16: gradients would underflow"),
        ("device", "tpu", "device=tpu"),
        ("patch", "ture", "patch must be true or false, got 'ture'"),
        ("compile", "flase", "compile must be true or false, got 'flase'"),
        ("resume", 1, "resume must be true or false, got 1"),
        ("batch_size", 0, "batch_size must be an integer >= 1, got 0"),
        ("batch_size", 41, "the dataset has 40 rows, but one step takes 41"),
        ("epochs", "many", "epochs must be an integer >= 1, got 'many'"),
        ("max_steps_per_epoch", 1.5, "max_steps_per_epoch must be an integer >= 1 or null"),
        ("seed", -1, "seed must be an integer from 0"),
        ("clip_grad_norm", "much", "clip_grad_norm must be a number above 0 or null, got 'much'"),
        ("optimizer_in_bwd", True, "which clip_grad_norm=1.0 needs"),
        ("enable_activation_offloading", True, "off a GPU"),
        ("learning_rate", 1, "the config has no 'learning_rate'"),
    ],
)
def test_bad_configs_end_in_one_line_before_weights_are_read(
    run_recipe, settings, without_weights, key, value, message, tmp_path
):
    status, _ = run_recipe(RECIPE, *settings(**{"checkpoint": without_weights, key: value}))
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert message in status
    assert "\n" not in status
    assert not list(tmp_path.glob("out/step_*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "dataset: a file of it is empty"), ('[{"instruction": "W', "decoding 'string'")],
    ids=["empty", "truncated"],
)
def test_a_broken_file_of_data_is_an_error(
    run_recipe, settings, without_weights, text, message, tmp_path
):
    file = tmp_path / "data.json"
    file.write_text(text)
    overrides = {"checkpoint": without_weights, "dataset.data_files": file}
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert message in status


def test_a_logger_that_is_not_installed_is_an_error(
    run_recipe, settings, without_weights, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    logger = "torchtune.training.metric_logging.WandBLogger"
    status, _ = run_recipe(RECIPE, *settings(checkpoint=without_weights, metric_logger=logger))
    assert status.startswith("error: metric_logger: ``wandb`` package not found")


def test_a_folder_that_can_not_be_written_to_is_found_before_weights_are_read(
    run_recipe, settings, without_weights, tmp_path
):
    (tmp_path / "out").touch()
    status, _ = run_recipe(
        RECIPE, *settings(checkpoint=without_weights), "metric_logger.log_dir=/tmp"
    )
    assert f"File exists: '{tmp_path / 'out'}'" in status


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error(run_recipe, settings, without_weights):
    for device in ("cuda", "cuda:0"):
        status, _ = run_recipe(RECIPE, *settings(checkpoint=without_weights, device=device))
        assert status.startswith(f"error: device={device} dtype=fp32: ")


def test_a_config_of_lora_is_not_for_training_all_weights(run_recipe, settings):
    status, _ = run_recipe(RECIPE, *settings(), config="smollm2_135m/lora_finetune")
    assert status == "error: the config has a section lora, which is for lora_finetune.py"


def test_checkpoints_and_metrics_may_go_home(train, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(train("out", output_dir="~/out", max_steps_per_epoch=1)) == 1
    assert (tmp_path / "out/step_1").is_dir()


def test_a_model_and_a_tokenizer_that_do_not_fit_are_told_apart(
    run_recipe, settings, without_weights
):
    config = json.loads((without_weights / "config.json").read_text()) | {"vocab_size": 100}
    (without_weights / "config.json").write_text(json.dumps(config))
    status, _ = run_recipe(RECIPE, *settings(checkpoint=without_weights))
    assert "but the model knows 100" in status


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "is a checkpoint of an earlier run: continue it by resume=true"),
        ({"resume": True, "seed": 1}, "its seed was 0, and is 1 now"),
        ({"resume": True, "batch_size": 2}, "its rows_per_step was 4, and is 2 now"),
        ({"resume": True, "dtype": "bf16"}, "its dtype was torch.float32, and is torch.bfloat16"),
        # These would go on as they are stored, whatever the config says.
        ({"resume": True, "optimizer.lr": 1e-3}, "its optimizer.lr was 0.002, and is 0.001 now"),
        ({"resume": True, "optimizer": "torch.optim.SGD"}, "its optimizer._component_ was torcht"),
        ({"resume": True, "lr_scheduler.num_warmup_steps": 3}, "num_warmup_steps was 2, and is 3"),
        ({"resume": True, "lr_scheduler": None}, "is None now"),
    ],
)
def test_another_run_is_not_continued_by_mistake(train, run_recipe, settings, overrides, message):
    train(max_steps_per_epoch=1)
    status, _ = run_recipe(RECIPE, *settings(**{"max_steps_per_epoch": 1, **overrides}))
    assert message in status
    assert "\n" not in status


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("untied", "its model.name was tied, and is untied now"),
        ("tied", "its model.vocab_size was"),
    ],
)
def test_another_model_is_not_continued(
    train, run_recipe, settings, tiny_models, name, message, tmp_path
):
    train(max_steps_per_epoch=1)
    folder = Path(shutil.copytree(tiny_models[name], tmp_path / name))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 501}
    (folder / "config.json").write_text(json.dumps(config))
    overrides = {"max_steps_per_epoch": 1, "resume": True, "checkpoint": folder}
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert message in status


def test_a_corrupt_state_is_named(train, run_recipe, settings, tmp_path):
    train(max_steps_per_epoch=1)
    state = tmp_path / "out/step_1/training_state.pt"
    torch.save({"facts": RuntimeError}, state)  # of a class, which is not plain data
    overrides = {"max_steps_per_epoch": 1, "resume": True}
    status, _ = run_recipe(RECIPE, *settings(**overrides))
    assert f"{state} is not the state of a run" in status


def test_help_explains_every_key(run_recipe):
    config = OmegaConf.load(CONFIGS[0])
    status, out = run_recipe(RECIPE, "--help")
    assert status in (0, None)
    for key in config:
        assert key in out
