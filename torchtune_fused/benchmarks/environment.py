"""What a figure depends on, to stand beside it."""

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from torchtune_fused.build import kernel_status

_PACKAGES = (
    "torchtune-fused",
    "torch",
    "torchtune",
    "torchao",
    "triton",
    "transformers",
    "liger-kernel",
)


def environment(device: torch.device) -> dict[str, object]:
    """Machine, versions of us and the peers, commit, command and time."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else platform.processor() or "CPU",
        "kernels": gpu and kernel_status().usable,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
        "command": shlex.join(sys.orig_argv),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, marked if it was edited; None if it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
