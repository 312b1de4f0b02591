"""Finding nvcc: in the system, or in its PyPI packages."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# The oldest CUDA that a torch 2.10 wheel exists for.
MIN_CUDA = (12, 6)

INSTALL_ADVICE = "pip install 'torchtune-fused[build]', or install the CUDA toolkit"


class BuildError(RuntimeError):
    """The kernels can't be compiled.

    Attributes:
        reason: What is wrong.
        advice: What to do about it.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason
        self.advice = advice


@dataclass(frozen=True)
class Toolchain:
    """A working nvcc.

    Attributes:
        nvcc: The compiler.
        version: Its full version, such as ``"13.0.88"``.
    """

    nvcc: Path
    version: str

    @property
    def cuda(self) -> tuple[int, int]:
        """The CUDA version, such as ``(13, 0)``."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def root(self) -> Path:
        """The folder of its ``bin``, ``include`` and ``lib``, which it alone knows.

        What lies on the PATH may be a link to nvcc, or a script that calls it.
        """
        dry_run = subprocess.run([self.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        match = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
        return Path(match[1]).resolve() if match else self.nvcc.resolve().parent.parent


@cache
def find_toolchain() -> Toolchain:
    """Find nvcc and a C++ compiler for it.

    Looked at in this order: ``CUDA_HOME``, ``PATH``, ``/usr/local/cuda``, and the PyPI packages of
    the extra ``[build]``. ``CUDA_HOME``, when set, is the only place.

    Raises:
        BuildError: If there is no nvcc, only ones that are too old, or no C++ compiler.
    """
    host_compiler = os.environ.get("NVCC_CCBIN", "g++")
    if shutil.which(host_compiler) is None:
        raise BuildError(
            f"nvcc needs a C++ compiler, and {host_compiler!r} is not on the PATH",
            "install g++, or set NVCC_CCBIN",
        )
    too_old = []
    for nvcc in _candidates():
        toolchain = Toolchain(nvcc, _version(nvcc))
        if toolchain.cuda >= MIN_CUDA:
            return toolchain
        too_old.append(f"{nvcc} is {toolchain.version}, older than {MIN_CUDA[0]}.{MIN_CUDA[1]}")
    raise BuildError("; ".join(too_old) or "there is no nvcc on this machine", INSTALL_ADVICE)


def _candidates() -> list[Path]:
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home, "bin", "nvcc")
        if not nvcc.is_file():
            raise BuildError(f"CUDA_HOME is {home}, which holds no bin/nvcc", "unset or correct it")
        return [nvcc]
    found = [Path(path) for path in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if path]
    if spec := importlib.util.find_spec("nvidia"):
        found += [Path(folder, "cu13", "bin", "nvcc") for folder in spec.submodule_search_locations]
    return [nvcc for nvcc in found if nvcc.is_file()]


def _version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", text)
    if match is None:
        raise BuildError(f"{nvcc} does not tell its version", INSTALL_ADVICE)
    return match[1]
