"""What ptxas reports about each kernel, and the rules that every kernel must keep."""

import re
import shutil
import subprocess
from dataclasses import dataclass

# The most that a block may declare statically, on every architecture. More than that is asked for
# at launch (dynamic shared memory), where the host checks it against the GPU's own limit.
MAX_STATIC_SHARED = 48 * 1024

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
# ptxas calls it information when it serialises the tensor-core instructions of a Hopper kernel.
_COMPLAINT = re.compile(r"\bwarning\b|Potential Performance Loss", re.IGNORECASE)


@dataclass
class KernelReport:
    """The resources of one kernel on one architecture.

    Attributes:
        name: Mangled name.
        arch: As ptxas writes it, such as ``"90a"``.
        registers: Registers a thread.
        static_shared: Statically declared shared memory, bytes a block.
        stack: Local memory that is no spill, such as an array indexed at run time, bytes a thread.
        spills: Bytes of registers stored to and loaded from local memory, a thread.
    """

    name: str
    arch: str
    registers: int = 0
    static_shared: int = 0
    stack: int = 0
    spills: int = 0


def parse_report(text: str) -> list[KernelReport]:
    """Read the output of ``nvcc -Xptxas=-v``, one entry for each kernel and architecture."""
    reports: list[KernelReport] = []
    in_entry = False
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            reports.append(KernelReport(match[1], match[2]))
        elif "Function properties for" in line:
            # Device functions that were not inlined have properties of their own.
            in_entry = bool(reports) and line.endswith(reports[-1].name)
        elif reports and (match := _SPILLS.search(line)):
            stack, stores, loads = map(int, match.groups())
            reports[-1].spills += stores + loads
            if in_entry:
                reports[-1].stack = stack
        elif reports and (match := _USED.search(line)):
            reports[-1].registers = int(match[1])
            if shared := _SHARED.search(line):
                reports[-1].static_shared = int(shared[1])
    return reports


def find_violations(text: str) -> list[str]:
    """What breaks the rules in a compiler's output: spills, shared memory, and complaints.

    Returns:
        One line for each violation; empty if every kernel keeps the rules. Output without a kernel
        is a violation too, since nothing was checked.
    """
    found = [line.strip() for line in text.splitlines() if _COMPLAINT.search(line)]
    kernels = parse_report(text)
    if not kernels:
        found.append("ptxas reported no kernel")
    for kernel in kernels:
        where = f"{_demangle(kernel.name)} on sm_{kernel.arch}"
        if kernel.spills:
            found.append(f"{where} spills {kernel.spills} bytes of registers")
        if kernel.static_shared > MAX_STATIC_SHARED:
            limit = MAX_STATIC_SHARED
            found.append(f"{where} declares {kernel.static_shared} bytes shared, above {limit}")
    return found


def summarise(text: str) -> str:
    """One line for each architecture: kernels, and the largest of each resource."""
    by_arch: dict[str, list[KernelReport]] = {}
    for kernel in parse_report(text):
        by_arch.setdefault(kernel.arch, []).append(kernel)
    lines = []
    for arch, kernels in sorted(by_arch.items()):
        registers = max(kernel.registers for kernel in kernels)
        shared = max(kernel.static_shared for kernel in kernels)
        stack = max(kernel.stack for kernel in kernels)
        spills = sum(kernel.spills for kernel in kernels)
        lines.append(
            f"sm_{arch}: {len(kernels)} kernels, at most {registers} registers, {shared} bytes of "
            f"static shared memory and {stack} of stack; {spills} bytes spilled"
        )
    return "\n".join(lines)


def _demangle(name: str) -> str:
    if shutil.which("c++filt") is None:
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
