"""Which GPU architectures a build of the kernels is for, and which GPUs can run it."""

import os
import re
from dataclasses import dataclass
from pathlib import PurePath

import torch

ALL_ARCHS = "8.0;8.6;8.9;9.0a"
MIN_CAPABILITY = (8, 0)

_ARCH = re.compile(r"(\d+)\.(\d)(a?)(\+PTX)?")
_NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0"}


@dataclass(frozen=True)
class Target:
    """The architectures that one library holds code for.

    Attributes:
        native: Architectures with machine code, ascending: ``("8.0", "9.0a")``.
        ptx: The architecture whose PTX is embedded, which the driver compiles for any later GPU.
        forced: The library takes the code path of ``ptx`` whatever GPU it runs on.
    """

    native: tuple[str, ...]
    ptx: str | None = None
    forced: bool = False

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read a list in the form of ``TORCH_CUDA_ARCH_LIST``, such as ``8.0;8.6+PTX``.

        9.0 always means 9.0a, whose instructions the Hopper kernels are written in. Of several
        entries with ``+PTX`` the lowest counts, since its PTX runs wherever the others' does.

        Raises:
            ValueError: If an entry is no architecture, or one below 8.0.
        """
        native, with_ptx = set(), set()
        for entry in _entries(text):
            match = _ARCH.fullmatch(entry)
            if match is None:
                raise ValueError(
                    f"{entry!r} is no GPU architecture; write for example '8.6' or '8.0;9.0+PTX'"
                )
            major, minor, _, ptx = match.groups()
            if (int(major), int(minor)) < MIN_CAPABILITY:
                raise ValueError(f"the kernels need architecture 8.0 or later, not {entry!r}")
            native.add(
                f"{major}.{minor}a" if (major, minor) == ("9", "0") else entry[: match.end(3)]
            )
            if ptx:
                with_ptx.add(f"{major}.{minor}")
        lowest_ptx = min(with_ptx, key=_capability, default=None)
        return cls(tuple(sorted(native, key=_capability)), lowest_ptx)

    @classmethod
    def for_this_machine(cls) -> "Target":
        """What a build on first use is for.

        ``TORCHTUNE_FUSED_ARCH`` forces one architecture's code path; else ``TORCH_CUDA_ARCH_LIST``
        says it (which other packages share, so that entries below 8.0 are left out); else it is
        the GPUs that torch sees.

        Raises:
            ValueError: If a variable holds something that is no architecture, or none from 8.0 on.
        """
        if forced := os.environ.get("TORCHTUNE_FUSED_ARCH"):
            return cls((), cls.parse(forced).native[0], forced=True)
        if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            recent = [entry for entry in _entries(listed) if not re.match(r"[1-7]\.", entry)]
            if not recent:
                raise ValueError(
                    f"TORCH_CUDA_ARCH_LIST is {listed!r}, but the kernels need 8.0 or later: add "
                    "such an architecture, or unset it to build for the GPUs present"
                )
            return cls.parse(";".join(recent))
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return cls.parse(";".join(f"{major}.{minor}" for major, minor in found))

    @property
    def has_sm90(self) -> bool:
        """Whether the Hopper kernels, the files named ``*_sm90.cu``, are part of this build."""
        return "9.0a" in self.native or (self.forced and self.ptx == "9.0a")

    def includes(self, source: PurePath) -> bool:
        """Whether a source file belongs to this build."""
        return self.has_sm90 or not _is_sm90(source)

    def nvcc_flags(self, source: PurePath) -> list[str]:
        """The flags that make nvcc generate this target's code for one source file."""
        flags = ["-DTTF_HAS_SM90"] if self.has_sm90 else []
        if self.forced:
            flags.append(f"-DTTF_FORCED_ARCH={_number(self.ptx).rstrip('a')}")
        if source.suffix == ".cu":
            codes = [(arch, self._front_end(arch), "sm") for arch in self.native]
            if self.ptx:
                codes.append((self.ptx, self.ptx, "compute"))
            if _is_sm90(source):
                codes = [code for code in codes if code[0] == "9.0a"]
            flags += [
                f"-gencode=arch=compute_{_number(front_end)},code={kind}_{_number(arch)}"
                for arch, front_end, kind in codes
            ]
        return flags

    def _front_end(self, arch: str) -> str:
        """What a source is parsed and optimised for before it becomes machine code of ``arch``.

        The lowest of the same major version, which saves a third of the time of a build for 8.0,
        8.6 and 8.9. So device code must not ask for a minor version; the host knows it.
        """
        if arch.endswith("a"):
            return arch
        return next(low for low in self.native if _capability(low)[0] == _capability(arch)[0])

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the library.

        Machine code runs on later minor versions of the same major one; that of an ``a``
        architecture on that very one only; PTX on everything later.
        """
        for arch in self.native:
            major, minor = _capability(arch)
            if arch.endswith("a") and (major, minor) == capability:
                return True
            if not arch.endswith("a") and major == capability[0] and minor <= capability[1]:
                return True
        return self.ptx is not None and _capability(self.ptx) <= capability

    def __str__(self) -> str:
        if self.forced:
            return f"{self.ptx}, forced"
        return " ".join(self.native) + (f", PTX {self.ptx}" if self.ptx else "")


def _entries(text: str) -> list[str]:
    for name, archs in _NAMES.items():
        text = re.sub(rf"\b{name}\b", archs, text)
    return re.split(r"[;,\s]+", text.strip("; ,\t"))


def _is_sm90(source: PurePath) -> bool:
    return source.stem.endswith("_sm90")


def _capability(arch: str) -> tuple[int, int]:
    major, minor = arch.rstrip("a").split(".")
    return int(major), int(minor)


def _number(arch: str) -> str:
    return arch.replace(".", "")
