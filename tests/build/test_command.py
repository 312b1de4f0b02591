import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import torchtune_fused.ops  # noqa: F401  (defines the schemas)
from torchtune_fused import cli
from torchtune_fused.build import command
from torchtune_fused.build.compile import LIBRARY_NAME, BuildInfo
from torchtune_fused.build.sources import kernel_dir
from torchtune_fused.build.target import Target

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def small_build(kernels, monkeypatch):
    """The command, compiling the small sources."""
    monkeypatch.setattr(command, "kernel_dir", lambda: kernels)
    return kernels


def test_builds_ahead_and_checks(small_build, toolchain, capsys):
    assert cli.main(["build", "--arch", "8.0;9.0a", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "sm_80: 1 kernels" in printed and "sm_90a: 1 kernels" in printed
    # Several architectures come with PTX for GPUs that are later than all of them.
    info = BuildInfo.read(small_build / LIBRARY_NAME)
    assert info.target == Target(("8.0", "9.0a"), "8.0")
    left = [path.name for path in small_build.iterdir() if path.suffix not in (".cu", ".cpp")]
    assert sorted(left) == ["common", LIBRARY_NAME]


def test_check_fails_on_a_kernel_that_spills(small_build, toolchain, capsys):
    with (small_build / "scale.cu").open("a") as file:
        file.write(
            "__global__ void __launch_bounds__(1024) spilling(double* x) {\n"
            "  double v[64];\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
            "  __syncthreads();\n"
            "#pragma unroll\n"
            "  for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = v[i] * v[63 - i];\n"
            "}\n"
        )
    assert cli.main(["build", "--arch", "8.6", "--check"]) == 1
    assert "spilling(double*) on sm_86 spills" in capsys.readouterr().err
    assert not (small_build / LIBRARY_NAME).exists()


@pytest.mark.parametrize("arch", ["7.0", "sm_90"])
def test_architecture_that_is_none(arch, capsys):
    assert cli.main(["build", "--arch", arch]) == 1
    message = capsys.readouterr().err
    assert message.startswith("torchtune-fused build: ") and arch in message


def test_every_kernel_of_the_package_is_bound_to_an_op():
    source = (kernel_dir() / "bindings.cpp").read_text()
    bound = re.findall(r'm\.impl\("(\w+)"', source)
    assert bound
    for name in bound:
        assert hasattr(torch.ops.torchtune_fused, name), f"no schema for {name} in ops/"


@pytest.mark.parametrize("compiled", [True, False])
def test_wheel(compiled, tmp_path, monkeypatch):
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    checkout = tmp_path / "checkout"
    for name in filter(None, files):
        if (CHECKOUT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(CHECKOUT / name, checkout / name)
    if compiled:
        (checkout / "kernels" / LIBRARY_NAME).write_bytes(b"the library")
    # pip's odd spelling of: use the setuptools that is installed, and no network
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")
    command._build_wheel(checkout)

    (wheel,) = (checkout / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "torchtune_fused/build/load.py",
        "torchtune_fused/kernels/bindings.cpp",
        "torchtune_fused/kernels/common/cuda_utils.h",
        "torchtune_fused/kernels/norm/rms_norm.cu",
        "torchtune_fused/kernels/norm/rms_norm.cuh",
    } <= names
    assert (f"torchtune_fused/kernels/{LIBRARY_NAME}" in names) is compiled
    # No Python in the library: the wheel is for any Python 3, and with it for one platform.
    platform = re.sub(r"\W", "_", sysconfig.get_platform()) if compiled else "any"
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
