import os
import subprocess
import sys

import pytest

from torchtune_fused.cli import main


def test_doctor_finds_this_environment_usable(capsys):
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    for name in ("Python", "torch ", "torchtune", "torchao", "GPU", "CUDA compiler", "kernels"):
        assert name in report


def test_doctor_names_a_torchao_that_torchtune_cannot_use(tmp_path):
    newer = tmp_path / "torchao-0.18.0.dist-info"
    newer.mkdir()
    (newer / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.18.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "torchtune_fused.cli", "doctor"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "0.18.0" in done.stdout
    assert "pip install 'torchao>=0.13,<0.16'" in done.stdout
    assert "not usable" in done.stdout


def test_cp_copies_what_it_lists(tmp_path, capsys):
    assert main(["cp"]) == 0
    names = capsys.readouterr().out.split()
    assert "generate.py" in names and "smollm2_135m/generate.yaml" in names
    for name in names:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        assert main(["cp", name, str(folder)]) == 0
        assert len(list(folder.iterdir())) == 1


def test_cp_does_not_overwrite_unasked(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    target.write_text("edited")
    assert main(["cp", "configs/smollm2_135m/generate.yaml", str(target)]) == 1
    assert target.read_text() == "edited"
    assert "--force" in capsys.readouterr().err
    assert main(["cp", "--force", "smollm2_135m/generate.yaml", str(target)]) == 0
    assert target.read_text() != "edited"


@pytest.mark.parametrize("name", ["nothing.py", "../pyproject.toml", "__init__.py"])
def test_cp_refuses_what_is_not_shipped(name, tmp_path, capsys):
    assert main(["cp", name, str(tmp_path)]) == 1
    assert name in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
