import os
import subprocess
import sys
import warnings

import pytest
import torch

from torchtune_fused.build import kernel_status, load, load_kernels
from torchtune_fused.build.compile import LIBRARY_NAME, build_library
from torchtune_fused.build.target import Target
from torchtune_fused.build.toolchain import find_toolchain

cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    """A process that has not tried to load the kernels yet."""
    monkeypatch.setattr(load, "_outcome", None)
    find_toolchain.cache_clear()
    yield
    find_toolchain.cache_clear()


@pytest.fixture
def a10(monkeypatch, kernels):
    """What torch and the driver say on a machine with an A10, and sources that compile quickly."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A10")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(load, "_driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(load, "kernel_dir", lambda: kernels)
    return kernels


def build_ahead(kernels, target):
    built = build_library(kernels, Target.parse(target), find_toolchain())
    return built.rename(kernels / LIBRARY_NAME)


@cpu_torch
def test_cpu_build_of_torch_needs_no_kernels_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernels() is False
    status = kernel_status()
    assert not status.usable
    assert status.reason == f"torch {torch.__version__} is not a CUDA build"


def test_missing_compiler_leaves_the_references_and_warns_once(a10, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="without its CUDA kernels.*holds no bin/nvcc") as caught:
        assert load_kernels() is False
        assert load_kernels() is False
    assert len(caught) == 1
    status = kernel_status()
    assert not status.usable and status.library is None
    assert "none was built ahead, and CUDA_HOME is" in status.reason
    assert status.advice == "unset or correct it"

    from torchtune_fused.ops import rms_norm

    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    # fp64 rounding of values around one
    torch.testing.assert_close(rms_norm(x, weight), expected, rtol=0, atol=1e-14)


def test_kernels_can_be_turned_off(a10, monkeypatch):
    monkeypatch.setenv("TORCHTUNE_FUSED_KERNELS", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who turned them off need not be told
        assert load_kernels() is False
    assert "TORCHTUNE_FUSED_KERNELS=0" in kernel_status().reason


def test_gpu_older_than_the_kernels(a10, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.warns(UserWarning, match=r"capability 7\.5.*CUDA_VISIBLE_DEVICES"):
        assert load_kernels() is False


def test_status_before_the_first_use_compiles_nothing(a10, toolchain, empty_cache):
    status = kernel_status()
    assert not status.usable
    assert status.reason == "not compiled yet for 8.6 (none was built ahead)"
    assert "torchtune-fused build" in status.advice
    assert not empty_cache.exists()


@cpu_torch
def test_library_without_a_cuda_torch_is_refused(a10, toolchain):
    # Compiled on first use, by the real compiler; then libtorch_cuda.so is not there.
    with pytest.warns(UserWarning, match="does not load: libtorch_cuda.so"):
        assert load_kernels() is False


def test_library_built_ahead_is_preferred(a10, toolchain):
    library = build_ahead(a10, "8.0;8.6")
    status = kernel_status()
    assert (status.usable, status.library) == (True, library)
    assert status.archs == "8.0 8.6"


def test_library_built_ahead_from_other_sources_is_not_used(a10, toolchain):
    build_ahead(a10, "8.6")
    with (a10 / "scale.cu").open("a") as file:
        file.write("// edited\n")
    assert "was built from other sources" in kernel_status().reason


def test_library_built_ahead_for_another_gpu_is_not_used(a10, toolchain):
    build_ahead(a10, "8.9")
    assert "is for 8.9, and GPU 0 has compute capability 8.6" in kernel_status().reason


def test_forcing_an_architecture_passes_over_other_libraries(a10, toolchain, monkeypatch):
    build_ahead(a10, "8.6")
    monkeypatch.setenv("TORCHTUNE_FUSED_ARCH", "8.0")
    assert kernel_status().reason.startswith("not compiled yet for 8.0, forced")


def test_driver_older_than_the_compiler(a10, toolchain, monkeypatch):
    monkeypatch.setattr(load, "_driver_cuda", lambda: (toolchain.cuda[0] - 1, 4))
    with pytest.warns(UserWarning, match="needs a driver for CUDA.*update the driver"):
        assert load_kernels() is False


def test_misspelt_architecture(a10, toolchain, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "sm_86")
    with pytest.warns(UserWarning, match="'sm_86' is no GPU architecture.*TORCH_CUDA_ARCH_LIST"):
        assert load_kernels() is False


def test_cache_that_cannot_be_written(a10, toolchain, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="compiling failed.*set XDG_CACHE_HOME"):
        assert load_kernels() is False


@pytest.mark.gpu
@pytest.mark.parametrize("forced", ["", "8.6"])
def test_kernels_run_on_this_gpu(forced):
    program = """
import torch
from torchtune_fused import ops
from torchtune_fused.build import kernel_status, load_kernels
assert load_kernels(), kernel_status()
x = torch.randn(5, 4096, device="cuda", dtype=torch.bfloat16)
weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
with torch.profiler.profile() as profile:
    y = ops.rms_norm(x, weight)
assert any("rms_norm_kernel" in event.key for event in profile.key_averages())
wide = x.double()
truth = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
# fp32 inside, rounded once to bf16: half a unit in the last of 8 bits
torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)
"""
    environment = {**os.environ, "TORCHTUNE_FUSED_ARCH": forced}
    del environment["XDG_CACHE_HOME"]  # the user's own: this compiles everything
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
