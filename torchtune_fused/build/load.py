"""Loading the kernels into this process, and saying why when that can't be done."""

import ctypes
import os
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from torchtune_fused.build.compile import LIBRARY_NAME, BuildInfo, build_library, cached_library
from torchtune_fused.build.sources import kernel_dir, source_hash
from torchtune_fused.build.target import MIN_CAPABILITY, Target
from torchtune_fused.build.toolchain import BuildError, find_toolchain


@dataclass(frozen=True)
class KernelStatus:
    """Whether the CUDA kernels can be used by this process, and if not, why.

    Attributes:
        usable: False if everything runs on the reference path.
        library: The library that is or would be loaded; None if there is none yet.
        archs: What architectures the library has code for, in words; empty without a library.
        reason: Why it is so.
        advice: What to do to make the kernels usable; empty if nothing need or can be done.
    """

    usable: bool
    library: Path | None = None
    archs: str = ""
    reason: str = ""
    advice: str = ""


class _Unusable(Exception):
    def __init__(self, reason: str, advice: str = "") -> None:
        self.reason, self.advice = reason, advice


_lock = threading.Lock()
_outcome: KernelStatus | None = None


def load_kernels() -> bool:
    """Load the CUDA kernels, compiling them first if no library for this machine exists.

    To be called where CUDA tensors first appear; cheap from the second call on. Ops registered by
    ``torchtune_fused.ops`` run on the kernels from then on, or on their references, in which case
    one warning says why if there is a GPU. ``TORCHTUNE_FUSED_KERNELS=0`` turns the kernels off.

    Returns:
        Whether the kernels are loaded.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = _load()
    return _outcome.usable


def kernel_status() -> KernelStatus:
    """Say whether the kernels are usable; neither compiles nor loads anything."""
    if _outcome is not None:
        return _outcome
    try:
        return _find(compile_if_missing=False)
    except _Unusable as why:
        return KernelStatus(False, reason=why.reason, advice=why.advice)


def _load() -> KernelStatus:
    try:
        status = _find(compile_if_missing=True)
        try:
            torch.ops.load_library(status.library)
        except OSError as error:
            raise _Unusable(
                f"{status.library} does not load: {error.__cause__ or error}",
                "torchtune-fused build",
            ) from error
        return status
    except _Unusable as why:
        if torch.cuda.is_available() and not _turned_off():
            warnings.warn(
                f"torchtune_fused runs without its CUDA kernels, on plain PyTorch: {why.reason}. "
                f"To change that: {why.advice}",
                stacklevel=4,
            )
        return KernelStatus(False, reason=why.reason, advice=why.advice)


def _turned_off() -> bool:
    return os.environ.get("TORCHTUNE_FUSED_KERNELS") == "0"


def _find(compile_if_missing: bool) -> KernelStatus:
    """Find a library that this machine can load; raise _Unusable if there is none."""
    _check_machine()
    mismatch = "none was built ahead"
    try:
        ahead = kernel_dir() / LIBRARY_NAME
        if ahead.is_file():
            info = BuildInfo.read(ahead)
            mismatch = _mismatch(info)
            if not mismatch:
                return KernelStatus(True, ahead, str(info.target), "built ahead")
            mismatch = f"{ahead} {mismatch}"
        return _find_own(mismatch, compile_if_missing)
    except BuildError as error:
        raise _Unusable(f"{mismatch}, and {error.reason}", error.advice) from error
    except ValueError as error:  # an architecture that is none, in a variable
        raise _Unusable(
            str(error), "correct TORCHTUNE_FUSED_ARCH or TORCH_CUDA_ARCH_LIST"
        ) from error
    except (OSError, NotImplementedError) as error:  # the latter where files can't be locked
        raise _Unusable(
            f"{mismatch}, and compiling failed: {error}",
            "set XDG_CACHE_HOME to a folder on a disk that can be written",
        ) from error


def _find_own(mismatch: str, compile_if_missing: bool) -> KernelStatus:
    """Find the library compiled on this machine, or compile it."""
    toolchain = find_toolchain()
    target = Target.for_this_machine()
    if too_new := _driver_mismatch(toolchain.cuda):
        raise _Unusable(
            f"what {toolchain.nvcc} compiles {too_new}",
            "update the driver, or set CUDA_HOME to an older CUDA toolkit",
        )
    library = cached_library(kernel_dir(), target, toolchain)
    if not library.is_file():
        if not compile_if_missing:
            raise _Unusable(
                f"not compiled yet for {target} ({mismatch})",
                "torchtune-fused build, or wait while the first use compiles them",
            )
        build_library(kernel_dir(), target, toolchain)
    return KernelStatus(True, library, str(target), "compiled on first use")


def _check_machine() -> None:
    if _turned_off():
        raise _Unusable("turned off by TORCHTUNE_FUSED_KERNELS=0", "unset it")
    if sys.platform != "linux":
        raise _Unusable("the kernels are built for Linux only")
    if torch.version.cuda is None:
        raise _Unusable(
            f"torch {torch.__version__} is not a CUDA build",
            "if this machine has an NVIDIA GPU, install one (https://pytorch.org)",
        )
    if not torch.cuda.is_available():
        raise _Unusable("torch sees no CUDA GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    for index in range(torch.cuda.device_count()):
        if (found := torch.cuda.get_device_capability(index)) < MIN_CAPABILITY:
            raise _Unusable(
                f"GPU {index} ({torch.cuda.get_device_name(index)}) has compute capability "
                f"{found[0]}.{found[1]}, and the kernels need 8.0 or later",
                "leave it out of CUDA_VISIBLE_DEVICES",
            )


def _mismatch(info: BuildInfo | None) -> str:
    """Why a library built ahead is not for this machine; empty if it is."""
    if info is None or info.sources != source_hash(kernel_dir()):
        return "was built from other sources"
    if os.environ.get("TORCHTUNE_FUSED_ARCH"):
        if info.target != Target.for_this_machine():
            return f"is for {info.target}, not for what TORCHTUNE_FUSED_ARCH asks"
    elif info.target.forced:
        return f"is for {info.target}, which only TORCHTUNE_FUSED_ARCH asks for"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not info.target.runs_on((major, minor)):
            return f"is for {info.target}, and GPU {index} has compute capability {major}.{minor}"
    return _driver_mismatch(info.cuda)


def _driver_mismatch(cuda: tuple[int, int]) -> str:
    """Why the driver can't run the CUDA runtime inside a library; empty if it can.

    The runtime needs a driver of its own major version or a later one, whatever version torch
    itself was built with.
    """
    driver = _driver_cuda()
    if driver[0] >= cuda[0]:
        return ""
    return f"needs a driver for CUDA {cuda[0]}, and this one is for CUDA {driver[0]}.{driver[1]}"


def _driver_cuda() -> tuple[int, int]:
    version = ctypes.c_int(0)
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10
