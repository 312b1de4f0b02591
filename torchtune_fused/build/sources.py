"""The kernels' sources: where they are, and hashes that change when they do."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

_SUFFIXES = {".cu", ".cuh", ".cpp", ".h"}
_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def kernel_dir() -> Path:
    """The folder of the sources, which also holds the library when one was built ahead."""
    return Path(find_spec("torchtune_fused.kernels").submodule_search_locations[0])


def translation_units(folder: Path) -> list[Path]:
    """The files to compile, relative to ``folder``: CUDA first, since it takes longest."""
    found = [
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix in {".cu", ".cpp"}
    ]
    return sorted(found, key=lambda path: (path.suffix != ".cu", path))


def source_hash(folder: Path) -> str:
    """A hash of every source and header below ``folder``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES):
        _update(digest, path.relative_to(folder), path)
    return digest.hexdigest()[:16]


def unit_hash(folder: Path, unit: Path, *context: str) -> str:
    """A hash of one translation unit with the headers it includes, and of ``context``.

    Args:
        folder: The folder of the sources, which ``#include "..."`` is relative to.
        unit: The file, relative to ``folder``.
        *context: What else decides the result: compiler, flags.
    """
    digest = hashlib.sha256("\0".join(context).encode())
    pending, seen = [unit], set()
    while pending:
        path = pending.pop()
        if path in seen or not (folder / path).is_file():
            continue
        seen.add(path)
        names = _INCLUDE.findall((folder / path).read_bytes())
        for name in map(bytes.decode, names):
            pending += [Path(name), path.parent / name]
    for path in sorted(seen):
        _update(digest, path, folder / path)
    return digest.hexdigest()[:32]


def _update(digest: "hashlib._Hash", name: Path, path: Path) -> None:
    content = path.read_bytes()
    digest.update(f"{name} {len(content)}\0".encode() + content)
