"""Finds or compiles the CUDA kernels, and loads them.

``load_kernels()`` where CUDA tensors first appear, ``kernel_status()`` to know what it does and
why, and ``torchtune-fused build`` to compile ahead. Needs torch, and nothing of torchtune: the ops
import this.
"""

from torchtune_fused.build.command import add_build_arguments, build_command
from torchtune_fused.build.load import KernelStatus, kernel_status, load_kernels
from torchtune_fused.build.toolchain import BuildError

__all__ = [
    "BuildError",
    "KernelStatus",
    "add_build_arguments",
    "build_command",
    "kernel_status",
    "load_kernels",
]
