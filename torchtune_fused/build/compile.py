"""Compiling the kernels into one library, by way of a cache that any number of processes share.

The library holds no Python and calls torch through its stable ABI only, so one file serves every
Python, and every torch from 2.10 on. It links the CUDA runtime statically, and can be built on a
machine without a GPU or a CUDA build of torch.
"""

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from torchtune_fused.build.sources import source_hash, translation_units, unit_hash
from torchtune_fused.build.target import Target
from torchtune_fused.build.toolchain import BuildError, Toolchain
from torchtune_fused.cache import cache_dir

LIBRARY_NAME = "torchtune_fused.abi3.so"
REPORT_NAME = "compiler.log"

_TORCH = Path(torch.__file__).parent
_FLAGS = [
    "-std=c++20",
    "-O3",
    # Costs size only, and lets the sanitizer and profilers name source lines.
    "-lineinfo",
    "-I.",
    f"-isystem={_TORCH / 'include'}",
    # The oldest torch that the library runs on: its headers hide whatever came later.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",
]
# What the kernels call in libtorch_cuda.so, which a CPU build of torch doesn't have.
STUB_SYMBOLS = ["aoti_torch_get_current_cuda_stream"]
_INFO_MARK = b"torchtune-fused build: "


@dataclass(frozen=True)
class BuildInfo:
    """What a library says of itself.

    Attributes:
        sources: Hash of the sources that it was built from.
        cuda: CUDA version of its compiler and of the runtime inside it.
        target: What GPUs it is for.
    """

    sources: str
    cuda: tuple[int, int]
    target: Target

    @classmethod
    def read(cls, library: Path) -> "BuildInfo | None":
        """Read it out of a library without loading that; None if the file holds none."""
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            start = data.find(_INFO_MARK)
            if start < 0:
                return None
            fields = json.loads(data[start + len(_INFO_MARK) : data.find(b"\0", start)])
        target = fields["target"]
        target = Target(tuple(target["native"]), target["ptx"], target["forced"])
        return cls(fields["sources"], tuple(fields["cuda"]), target)


def kernel_cache() -> Path:
    """Where compiled kernels are kept."""
    return cache_dir() / "kernels"


def cached_library(folder: Path, target: Target, toolchain: Toolchain) -> Path:
    """Where the library of these sources, this torch, CUDA and target is, once it is built."""
    key = [source_hash(folder), torch.__version__, toolchain.version, str(target), *_FLAGS]
    return kernel_cache() / sha256("\0".join(key).encode()).hexdigest()[:16] / LIBRARY_NAME


def build_library(folder: Path, target: Target, toolchain: Toolchain) -> Path:
    """Return the library of the sources in ``folder``, compiling what isn't in the cache.

    Processes that ask for the same library at once wait for the one that compiles. A build that
    is killed leaves no library, and the next one goes on from the files that it had compiled.
    ``MAX_JOBS`` limits the compilers that run at once (default: the number of cores).

    Args:
        folder: The sources.
        target: The GPUs to compile for.
        toolchain: The compiler.

    Returns:
        The library in the cache; the compiler's output lies beside it under ``REPORT_NAME``.

    Raises:
        BuildError: If a file doesn't compile or the library doesn't link.
    """
    library = cached_library(folder, target, toolchain)
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with _announced_lock(library.with_name("lock")):
        if not library.is_file():
            for left_by_killed_build in library.parent.glob("work-*"):
                shutil.rmtree(left_by_killed_build, ignore_errors=True)
            with TemporaryDirectory(prefix="work-", dir=library.parent) as work:
                _Build(folder, target, toolchain, Path(work)).run(library)
    return library


def _announced_lock(path: Path) -> AbstractContextManager:
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print("Waiting for another process that compiles the CUDA kernels", file=sys.stderr)
        return lock.acquire()


@dataclass(frozen=True)
class _Build:
    folder: Path
    target: Target
    toolchain: Toolchain
    work: Path

    def run(self, library: Path) -> None:
        units = [unit for unit in translation_units(self.folder) if self.target.includes(unit)]
        objects = {unit: self._object(unit) for unit in units}
        missing = [unit for unit in units if not objects[unit].is_file()]
        jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
        # One file has one architecture after the other compiled, unless there are cores to spare.
        threads = max(1, jobs // max(1, len(missing)))
        _in_parallel(
            lambda unit: self._compile(unit, objects[unit], threads),
            missing,
            jobs,
            f"Compiling CUDA kernels ({self.target})",
        )
        linked = self._link([*objects.values(), self._info_object()])
        report = "".join(path.with_suffix(".log").read_text() for path in objects.values())
        library.with_name(REPORT_NAME).write_text(report)
        linked.replace(library)

    def _flags(self, unit: Path) -> list[str]:
        return [*_FLAGS, *self.target.nvcc_flags(unit)]

    def _object(self, unit: Path) -> Path:
        context = [torch.__version__, self.toolchain.version, *self._flags(unit)]
        return kernel_cache() / "objects" / f"{unit_hash(self.folder, unit, *context)}.o"

    def _compile(self, unit: Path, result: Path, threads: int) -> None:
        made = self.work / result.name
        log = self._nvcc(f"--threads={threads}", *self._flags(unit), "-c", unit, "-o", made)
        result.parent.mkdir(exist_ok=True)
        made.with_suffix(".log").write_text(log)
        made.with_suffix(".log").replace(result.with_suffix(".log"))
        made.replace(result)

    def _info_object(self) -> Path:
        info = BuildInfo(source_hash(self.folder), self.toolchain.cuda, self.target)
        text = _INFO_MARK.decode() + json.dumps(asdict(info))
        source = self.work / "build_info.cpp"
        source.write_text(
            f'extern "C" [[gnu::used]] const char torchtune_fused_build[] = R"({text})";\n'
        )
        made = source.with_suffix(".o")
        self._nvcc("-c", source, "-o", made, "-Xcompiler=-fPIC")
        return made

    def _link(self, objects: list[Path]) -> Path:
        stub = self.work / "stub.cpp"
        stub.write_text("".join(f'extern "C" void {name}() {{}}\n' for name in STUB_SYMBOLS))
        shared = ["-shared", "-Xcompiler=-fPIC"]
        name = "libtorch_cuda.so"
        self._nvcc(
            *shared, "-cudart=none", f"-Xlinker=-soname,{name}", stub, "-o", self.work / name
        )
        made = self.work / LIBRARY_NAME
        self._nvcc(
            *shared,
            # Static, so that the CUDA version of torch doesn't matter, and with its symbols hidden,
            # so that torch's own copy of the runtime is not called instead.
            "-cudart=static",
            "-Xlinker=--exclude-libs,ALL",
            # A function that nobody defines fails here, not when the library is loaded.
            "-Xlinker=-z,defs",
            *objects,
            *(f"-L{path}" for path in (self.work, _TORCH / "lib", self.toolchain.root / "lib")),
            "-Xlinker=--no-as-needed",
            "-ltorch_cuda",
            "-ltorch_cpu",
            "-o",
            made,
        )
        return made

    def _nvcc(self, *args: str | Path) -> str:
        done = subprocess.run(
            [self.toolchain.nvcc, *args],
            cwd=self.folder,  # with relative names, results don't depend on where the sources lie
            env={**os.environ, "TMPDIR": str(self.work)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            failed = kernel_cache() / "failed.log"
            failed.write_text(f"{subprocess.list2cmdline(map(str, done.args))}\n{done.stdout}")
            errors = re.findall(r"^.*(?:error:|fatal|undefined).*$", done.stdout, re.MULTILINE)
            what = errors[0] if errors else f"exit status {done.returncode}"
            raise BuildError(f"nvcc failed: {what}", f"its whole output is in {failed}")
        return done.stdout


def _in_parallel(
    work: Callable[[Path], None], units: list[Path], jobs: int, description: str
) -> None:
    """Call ``work`` on each unit, with one progress line; the first failure cancels the rest."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, unit) for unit in units]
        bar = tqdm(as_completed(futures), description, len(futures), unit="file", disable=not units)
        try:
            for future in bar:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
