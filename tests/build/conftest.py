import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtune_fused.build.compile import kernel_cache
from torchtune_fused.build.toolchain import BuildError, Toolchain, find_toolchain

HEADER = "void launch_scale(float* x, float by, int n);\n"
KERNEL = """
#include "common/scale.h"
__global__ void scale(float* x, float by, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= by;
}
void launch_scale(float* x, float by, int n) { scale<<<(n + 255) / 256, 256>>>(x, by, n); }
"""
CALLER = """
#include "common/scale.h"
void twice(float* x, int n) { launch_scale(x, 2.f, n); }
"""


@pytest.fixture(scope="session")
def toolchain() -> Toolchain:
    try:
        return find_toolchain()
    except BuildError as error:
        pytest.skip(f"no CUDA compiler: {error}")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch) -> Path:
    """The kernel cache, in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TORCH_CUDA_ARCH_LIST", "TORCHTUNE_FUSED_ARCH", "TORCHTUNE_FUSED_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    return kernel_cache()


@pytest.fixture
def kernels(tmp_path) -> Path:
    """A folder of sources like the package's, small enough to compile in seconds."""
    folder = tmp_path / "kernels"
    (folder / "common").mkdir(parents=True)
    (folder / "common" / "scale.h").write_text(HEADER)
    (folder / "scale.cu").write_text(KERNEL)
    (folder / "caller.cpp").write_text(CALLER)
    return folder


class WatchedCompiler:
    """The real nvcc behind a script that notes each call, as a CUDA_HOME."""

    def __init__(self, home: Path, toolchain: Toolchain) -> None:
        self.home = home
        self.calls = home / "calls"
        nvcc = home / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        # A file called `hang` beside it makes it stop at caller.cpp, as a long compilation would.
        nvcc.write_text(
            f'#!/bin/sh\necho "$*" >> {self.calls}\n'
            f'case "$*" in *"-c caller.cpp"*) [ -e {home}/hang ] && touch {home}/hanging '
            f"&& sleep 100;; esac\n"
            f'exec {toolchain.nvcc} "$@"\n'
        )
        nvcc.chmod(0o755)
        self.toolchain = Toolchain(nvcc, toolchain.version)

    def compiled(self) -> list[str]:
        """The sources compiled since the last call of this, in order of their names."""
        words = [line.split() for line in self.calls.read_text().splitlines()]
        self.calls.write_text("")
        sources = [call[call.index("-c") + 1] for call in words if "-c" in call]
        return sorted(name for name in sources if not name.startswith("/"))

    def start_build(self, kernels: Path) -> subprocess.Popen:
        """Start a process that builds the library for 8.0 and prints where it is."""
        program = (
            "import sys\nfrom pathlib import Path\n"
            "from torchtune_fused.build.compile import build_library\n"
            "from torchtune_fused.build.target import Target\n"
            "from torchtune_fused.build.toolchain import find_toolchain\n"
            "print(build_library(Path(sys.argv[1]), Target.parse('8.0'), find_toolchain()))\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, kernels],
            env={**os.environ, "CUDA_HOME": str(self.home), "MAX_JOBS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def watched(tmp_path, toolchain) -> WatchedCompiler:
    return WatchedCompiler(tmp_path / "cuda", toolchain)
