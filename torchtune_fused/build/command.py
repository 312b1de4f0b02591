"""``torchtune-fused build``: compile the kernels ahead of use, on any machine that has nvcc."""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from torchtune_fused.build.compile import LIBRARY_NAME, REPORT_NAME, build_library
from torchtune_fused.build.report import find_violations, summarise
from torchtune_fused.build.sources import kernel_dir
from torchtune_fused.build.target import ALL_ARCHS, Target
from torchtune_fused.build.toolchain import BuildError, find_toolchain


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``torchtune-fused build``."""
    parser.add_argument(
        "--arch",
        help="architectures, in the form of TORCH_CUDA_ARCH_LIST, which is also the default; "
        f"without it, those of the GPUs here, or {ALL_ARCHS} where there are none",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail if the compiler reports spills, warnings, or too much static shared memory",
    )
    parser.add_argument(
        "--wheel", action="store_true", help="also build a wheel that holds the library, in dist/"
    )


def build_command(args: argparse.Namespace) -> int:
    """Compile the library into the package's folder, where it is found before any other.

    Args:
        args: What the options of ``add_build_arguments`` gave.

    Returns:
        The exit status: 1 if ``--check`` found violations.

    Raises:
        BuildError: If the kernels can't be compiled or the wheel can't be made.
        ValueError: If ``--arch`` names no architecture, or one below 8.0.
    """
    folder = kernel_dir()
    target = _target(args.arch)
    built = build_library(folder, target, find_toolchain())
    report = built.with_name(REPORT_NAME).read_text()
    print(summarise(report))
    if args.check and (violations := find_violations(report)):
        print("\n".join(violations), file=sys.stderr)
        return 1
    library = folder / LIBRARY_NAME
    _install(built, library)
    print(f"{library} ({library.stat().st_size / 2**20:.1f} MiB) holds code for {target}")
    if args.wheel:
        _build_wheel(folder.parent)
    return 0


def _target(listed: str | None) -> Target:
    if listed:
        target = Target.parse(listed)
    elif any(map(os.environ.get, ("TORCHTUNE_FUSED_ARCH", "TORCH_CUDA_ARCH_LIST"))) or (
        torch.cuda.is_available()
    ):
        target = Target.for_this_machine()
    else:
        target = Target.parse(ALL_ARCHS)
    if len(target.native) > 1 and target.ptx is None:
        # A library for several GPUs is one to give away, and may meet a GPU that is later than
        # all of them: for it, the driver compiles the lowest architecture's PTX.
        return replace(target, ptx=target.native[0].rstrip("a"))
    return target


def _install(built: Path, library: Path) -> None:
    made = library.with_name(f".{LIBRARY_NAME}.{os.getpid()}")
    try:
        shutil.copyfile(built, made)
        made.replace(library)
    except OSError as error:
        made.unlink(missing_ok=True)
        raise BuildError(
            f"{library} cannot be written: {error.strerror}",
            "install the package where you may write, such as in a virtual environment",
        ) from error


def _build_wheel(checkout: Path) -> None:
    if not (checkout / "pyproject.toml").is_file():
        raise BuildError(
            f"{checkout} is no source checkout, from which alone a wheel can be built",
            "pip install -e . in a checkout, and build there",
        )
    dist = checkout / "dist"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", dist, checkout]
    if subprocess.run(command).returncode:
        raise BuildError("pip could not build the wheel", "see its output above")
