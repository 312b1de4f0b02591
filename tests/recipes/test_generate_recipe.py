import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from torchtune_fused.recipes.generate import main

RECIPE = "torchtune_fused/recipes/generate.py"
CONFIGS = Path(__file__).parents[2] / "configs"
LAST_LINE = (
    r"prompt: \d+ tokens, [\d.]+ tokens/s \| decode: \d+ tokens, [\d.]+ tokens/s \| "
    r"peak memory: [\d.]+ GiB"
)


def tune_run(*arguments, folder):
    return subprocess.Popen(
        [Path(sys.executable).with_name("tune"), "run", *map(str, arguments)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def recipe(monkeypatch, capsys, smollm2):
    """Run the recipe on SmolLM2 in this process; returns its status, and what it wrote."""

    def run(*overrides, config="smollm2_135m/generate"):
        settings = [f"checkpoint={smollm2}", "device=cpu", "max_new_tokens=12", *overrides]
        monkeypatch.setattr("sys.argv", ["generate.py", "--config", str(config), *settings])
        with pytest.raises(SystemExit) as exit:
            main()
        written = capsys.readouterr().out
        return exit.value.code, written

    return run


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory):
    """A tiny random model with SmolLM2's vocabulary and a context that takes minutes to fill."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=100_000,
    )
    folder = tmp_path_factory.mktemp("endless")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_demo_answers_from_any_folder(smollm2, tmp_path):
    run = tune_run(RECIPE, "--config", "configs/smollm2_135m/generate.yaml", folder=tmp_path)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    answer, last = out.strip().splitlines()
    assert answer == "The capital of France is Paris."
    assert re.fullmatch(LAST_LINE, last)


def test_two_processes_answer_once_and_the_same(smollm2, tmp_path):
    overrides = ["temperature=0.9", "seed=3", "max_new_tokens=12"]
    arguments = [RECIPE, "--config", "smollm2_135m/generate", "device=cpu", *overrides]
    runs = [
        tune_run(*torchrun, *arguments, folder=tmp_path).communicate(timeout=300)[0]
        for torchrun in ([], ["--nproc_per_node", "2"])
    ]
    answers = [[line for line in out.splitlines() if "torchrun" not in line] for out in runs]
    assert len(answers[1]) == 2
    assert answers[0][0] == answers[1][0]
    assert re.fullmatch(LAST_LINE, answers[1][1])


def test_errors_are_one_line_in_every_process(smollm2, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(smollm2 / "tokenizer.json", tmp_path)
    run = tune_run(
        *("--nproc_per_node", "2", RECIPE, "--config", "smollm2_135m/generate"),
        *(f"checkpoint={tmp_path}", "device=cpu", "chat=false"),
        folder=tmp_path,
    )
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0
    assert re.search(r"^\[rank \d\] error: .*config\.json.*model_type", err, re.MULTILINE)
    # The one traceback is the launcher's, about the exit status of its processes.
    assert err.count("Traceback") == err.count("ChildFailedError:") == 1


def test_a_killed_rank_ends_the_job(smollm2, endless_model, tmp_path):
    run = tune_run(
        *("--nproc_per_node", "2", RECIPE, "--config", "smollm2_135m/generate"),
        *(f"checkpoint={endless_model}", f"tokenizer.path={smollm2}", "device=cpu"),
        *("prompt=Go on", "chat=false", "max_new_tokens=90000"),
        folder=tmp_path,
    )
    assert "torchrun" in run.stdout.readline()
    assert run.stdout.read(1), "no token was generated"
    ranks = children(run.pid)
    os.kill(ranks["1"], signal.SIGKILL)
    killed = time.monotonic()
    run.stdout.close()
    run.stderr.close()
    assert run.wait(timeout=60) != 0
    assert time.monotonic() - killed < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def children(pid):
    """Process ids of the ranks that torchrun started, by rank."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                found[variable[5:].decode()] = int(child)
    return found


def test_a_batch_writes_each_prompt_with_its_answer(recipe, tmp_path):
    questions = ["What is the capital of France?", "What is 1 + 1?"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(questions) + "\n")
    from_file = recipe(f"prompt_file={tmp_path / 'prompts.txt'}")
    assert from_file[0] in (0, None)
    assert "[1/2] What is the capital of France?\nThe capital of France is Paris." in from_file[1]
    assert "[2/2] What is 1 + 1?\n" in from_file[1]
    in_list = recipe(f"prompts=['{questions[0]}','{questions[1]}']")
    strip = lambda out: out.rsplit("\n", 2)[0]  # noqa: E731  (all but the line of speeds)
    assert strip(in_list[1]) == strip(from_file[1])


def test_plain_text_is_continued_and_taken_as_it_stands(recipe, smollm2):
    prompt = "1 + 1 = 2: {so} ${it} # goes, 2 + 2 ="
    status, out = recipe(f"prompt={prompt}", "chat=false", "max_new_tokens=6")
    assert status in (0, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    length = inputs.input_ids.shape[1]
    text = tokenizer.decode(expected[0, length:], skip_special_tokens=True)
    assert out.startswith(text + "\nprompt: ")
    assert f"prompt: {length} tokens," in out


def test_a_conversation_with_a_system_message_is_answered(recipe, tmp_path):
    config = OmegaConf.load(CONFIGS / "smollm2_135m/generate.yaml")
    config.messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Rome"},
        {"role": "user", "content": "That is wrong. What is it?"},
    ]
    OmegaConf.save(config, tmp_path / "mine.yaml")
    status, out = recipe("system=You are a geographer.", config=tmp_path / "mine.yaml")
    assert status in (0, None)
    assert "Paris" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint=/nowhere", "/nowhere: no such folder"),
        ("checkpoint=null", "expected a path, got None"),
        ("tokenizer.path=/nowhere", "/nowhere: no such folder"),
        ("tokenizer=null", "tokenizer must name a component, got None"),
        ("tokenizer.path=null", "tokenizer: expected"),
        ("tokenizer.colour=red", "unexpected keyword argument 'colour'"),
        ("tokenizer=no.such.Tokenizer", "Error loading 'no.such.Tokenizer'"),
        ("device=tpu", "device=tpu"),
        ("dtype=fp7", "fp7"),
        ("patch=ture", "patch must be true or false, got 'ture'"),
        ("prompt=", "prompt must hold text"),
        ("prompts=[]", "prompts must hold text"),
        ("prompts=[a,1]", "prompts must hold text"),
        ("prompts=hello", "prompts must be a list, got 'hello'"),
        ("prompt_file=5", "expected a path, got 5"),
        ("prompt_file=/nowhere.txt", "/nowhere.txt"),
        ("messages=[{role: user}]", "messages must be a list of {role, content}"),
        ("messages=[{role: user, content: 5}]", "messages must be a list of {role, content}"),
        ("messages=[hello]", "messages must be a list of {role, content}"),
        ("max_new_tokens=0", "max_new_tokens must be an integer >= 1, got 0"),
        ("max_new_tokens=many", "max_new_tokens must be an integer >= 1, got 'many'"),
        ("max_new_tokens=9000", "exceed the model's max_seq_len of 8192"),
        ("temperature=-1", "temperature must be"),
        ("top_k=0", "top_k must be"),
        ("top_p=2", "top_p must be"),
        ("seed=x", "seed must be"),
        ("temprature=1", "the config has no 'temprature'; it has checkpoint, tokenizer, device"),
        ("hello", "expected key=value, got 'hello'"),
        ("--verbose", "--verbose"),
    ],
)
def test_bad_values_end_in_one_line(recipe, override, message):
    status, out = recipe(override)
    assert isinstance(status, str)
    assert status.startswith("error: ")
    assert message in status
    assert "\n" not in status
    assert out == ""


def test_two_sources_of_prompts_are_refused(recipe):
    status, _ = recipe("prompts=[a,b]", "messages=[{role: user, content: c}]")
    assert "prompts and messages are set" in status


@pytest.mark.parametrize(
    "config", sorted(CONFIGS.glob("*/generate.yaml")), ids=lambda path: path.parent.name
)
def test_every_config_is_complete(config, recipe):
    """Each runs as it is, once its folder is filled: here with that of SmolLM2."""
    status, out = recipe("dtype=fp32", "max_new_tokens=2", "temperature=0", config=config)
    assert status in (0, None)
    assert out.startswith("The capital\n")
