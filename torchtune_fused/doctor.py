"""What ``torchtune-fused doctor`` examines: each requirement, what was found, and what to do."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

TORCH_MIN = (2, 10)
TORCHAO_RANGE = ((0, 13), (0, 16))


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        found: What was found, in words.
        usable: False if the package can't work like this.
        advice: What to do about it; empty if nothing needs doing.
    """

    name: str
    found: str
    usable: bool = True
    advice: str = ""

    @property
    def mark(self) -> str:
        """A sign for the terminal: fine, works with less, or broken."""
        return "✗" if not self.usable else ("!" if self.advice else "✓")


def examine() -> list[Check]:
    """Look at everything the package needs, from the interpreter to the kernels."""
    checks = [_python(), _torch(), _torchao(), _torchtune()]
    if all(check.usable for check in checks):
        checks += [_gpu(), _compiler(), _kernels()]
    return checks


def _python() -> Check:
    return Check("Python", ".".join(map(str, sys.version_info[:3])))


def _torch() -> Check:
    return _package(
        "torch",
        in_range=lambda v: v >= TORCH_MIN,
        advice="pip install 'torch>=2.10'",
    )


def _torchao() -> Check:
    return _package(
        "torchao",
        in_range=lambda v: TORCHAO_RANGE[0] <= v < TORCHAO_RANGE[1],
        advice="pip install 'torchao>=0.13,<0.16' (torchtune 0.6.1 imports with no other)",
    )


def _torchtune() -> Check:
    return _package(
        "torchtune",
        in_range=lambda v: v == (0, 6),
        advice="pip install torchtune==0.6.1",
        probe="torchtune.training",
    )


def _package(
    name: str, in_range: Callable[[tuple[int, int]], bool], advice: str, probe: str | None = None
) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "not installed", usable=False, advice=advice)
    major, minor = found.split("+")[0].split(".")[:2]
    if not in_range((int(major), int(minor))):
        return Check(name, found, usable=False, advice=advice)
    try:
        import_module(probe or name)
    except Exception as error:  # a broken install may raise anything
        return Check(name, f"{found}, import fails: {error!r}", usable=False, advice=advice)
    return Check(name, found)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        return Check("GPU", f"none ({why}): everything runs on the reference path")
    major, minor = torch.cuda.get_device_capability()
    found = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if (major, minor) < (8, 0):
        return Check("GPU", found, advice="the kernels need 8.0 or later; the reference path runs")
    return Check("GPU", found)


def _compiler() -> Check:
    from torchtune_fused.build.toolchain import BuildError, find_toolchain

    try:
        toolchain = find_toolchain()
    except BuildError as error:
        return Check("CUDA compiler", f"none: {error.reason}")
    return Check("CUDA compiler", f"{toolchain.nvcc}, CUDA {'.'.join(map(str, toolchain.cuda))}")


def _kernels() -> Check:
    from torchtune_fused.build import kernel_status

    status = kernel_status()
    if status.usable:
        return Check("kernels", f"{status.library} for {status.archs}")
    return Check("kernels", f"not usable: {status.reason}", advice=status.advice)
