import pytest
from omegaconf import OmegaConf

from torchtune_fused.recipe_config import find_config, parse

CONFIG = """
prompt: a text
prompts: null
count: 3
model:
  _component_: some.Model
  path: ${prompt}
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a recipe that gives back its config as plain data."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)

    def run(*overrides):
        seen = {}

        @parse
        def main(cfg):
            """What this recipe does."""
            seen.update(OmegaConf.to_container(cfg, resolve=True))

        monkeypatch.setattr("sys.argv", ["recipe.py", "--config", str(path), *overrides])
        with pytest.raises(SystemExit) as exit:
            main()
        return exit.value.code or seen

    return run


@pytest.mark.parametrize(
    "name",
    ["smollm2_135m/generate", "configs/smollm2_135m/generate.yaml", "smollm2_135m/generate.yaml"],
)
def test_configs_of_the_package_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_config(name)
    assert found.parts[-2:] == ("smollm2_135m", "generate.yaml")
    assert "checkpoint" in OmegaConf.load(found)


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs/smollm2_135m/generate.yaml"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert find_config("configs/smollm2_135m/generate.yaml").resolve() == mine


def test_an_unknown_config_is_an_error_that_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match=r"no config 'nope'.*smollm2_135m/generate"):
        find_config("nope")


def test_text_stays_text(run):
    for text in ("1 + 1 = 2 = x", "a: b", "[1, 2]", "# not a comment", "${count}", "42", "", "~"):
        seen = run(f"prompt={text}")
        assert seen["prompt"] == text
        assert seen["model"]["path"] == text
    assert run("prompt=null")["prompt"] is None
    assert run("prompt=None")["prompt"] is None


def test_null_empties_a_component_as_a_whole(run):
    assert run("model=null")["model"] is None


@pytest.mark.parametrize(
    ("values", "last"), [(["null", "5"], 5), (["5", "null"], None), (["'a = b'", "5"], 5)]
)
def test_of_several_values_for_a_key_the_last_counts(run, values, last):
    assert run(*(f"count={value}" for value in values))["count"] == last


def test_other_overrides_are_those_of_torchtune(run):
    assert run("count=5")["count"] == 5
    assert run("prompts=[a, 'b = c']")["prompts"] == ["a", "b = c"]
    assert run("model=other.Model", "model.extra=1")["model"] == {
        "_component_": "other.Model",
        "path": "a text",
        "extra": 1,
    }
    assert "prompts" not in run("~prompts")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cuont=5", "error: the config has no 'cuont'; it has prompt, prompts, count, model"),
        ("~cuont", "error: the config has no 'cuont'"),
        ("5", "error: expected key=value, got '5'"),
        ("--count", "error: Additional flag arguments not supported"),
        ("count=[1", "error: "),
    ],
)
def test_bad_overrides_are_one_line(run, override, message):
    status = run(override)
    assert status.startswith(message)
    assert "\n" not in status


def test_errors_of_users_are_one_line_and_bugs_keep_their_traceback(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["recipe.py", "--config", str(tmp_path / "config.yaml")])
    monkeypatch.setenv("RANK", "1")

    def failing(error):
        @parse
        def main(cfg):
            raise error

        return main

    with pytest.raises(SystemExit) as exit:
        failing(ValueError("first\n  second"))()
    assert exit.value.code == "[rank 1] error: first second"
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())()


@pytest.mark.parametrize("arguments", [["--help"], ["--config", "nope", "--help"]])
def test_help_prints_what_the_recipe_does(arguments, monkeypatch, capsys):
    @parse
    def main(cfg):
        """What this recipe does."""

    monkeypatch.setattr("sys.argv", ["recipe.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 0
    assert "What this recipe does." in capsys.readouterr().out


def test_a_config_must_hold_keys(tmp_path, monkeypatch):
    @parse
    def main(cfg):
        pass

    for content, message in (("- a\n", "must hold keys and values"), ("a: [", "error: ")):
        (tmp_path / "bad.yaml").write_text(content)
        monkeypatch.setattr("sys.argv", ["recipe.py", "--config", str(tmp_path / "bad.yaml")])
        with pytest.raises(SystemExit, match=message):
            main()
