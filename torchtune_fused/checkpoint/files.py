"""Checkpoint files: what tensors a folder holds, and each of them on its own, lazily."""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Names that safetensors uses; other dtypes (8-bit floats, packed ones) are not weights to us.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint whose files or tensors are not what the model needs."""


@dataclass(frozen=True)
class StoredTensor:
    """What a file says about a tensor, before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(ABC):
    """The tensors of one checkpoint folder, under the names they have there."""

    folder: Path

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """Names of all its tensors."""

    @abstractmethod
    def describe(self, names: Iterable[str]) -> dict[str, StoredTensor]:
        """Shape and dtype of some tensors, from the headers of the files that hold them.

        A tensor that its file turns out not to hold is left out.

        Raises:
            CheckpointError: If a file is absent, truncated or not of its format.
        """

    @abstractmethod
    def read(self, name: str) -> Any:
        """Context manager that gives one tensor, to be copied: it may be gone on leaving.

        Raises:
            CheckpointError: If its file can't be read.
        """


class SafetensorsCheckpoint(Checkpoint):
    """``model.safetensors``, or several files with an index.

    Args:
        folder (Path): The folder.

    Raises:
        CheckpointError: If the index is corrupt or names a file outside of the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        if index.is_file():
            self.files = read_index(index)
        else:
            with _open_safetensors(folder / SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), SINGLE)

    @property
    def names(self) -> set[str]:
        return set(self.files)

    def describe(self, names: Iterable[str]) -> dict[str, StoredTensor]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found = {}
        for file_name, wanted in by_file.items():
            with _open_safetensors(self.folder / file_name) as file:
                present = set(file.keys())
                for name in present.intersection(wanted):
                    header = file.get_slice(name)
                    found[name] = StoredTensor(
                        tuple(header.get_shape()),
                        self._dtype(file_name, name, header.get_dtype()),
                    )
        return found

    @contextmanager
    def read(self, name: str) -> Iterator[torch.Tensor]:
        # The file is mapped, and mapped pages count as resident until the mapping goes. So each
        # tensor gets a mapping of its own, and a load peaks at what it keeps plus one tensor.
        with _open_safetensors(self.folder / self.files[name]) as file:
            yield file.get_tensor(name)

    def _dtype(self, file_name: str, name: str, dtype: str) -> torch.dtype:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.folder / file_name}: {name} has dtype {dtype}, which is not supported; "
                f"supported: {', '.join(_DTYPES)}"
            )
        return _DTYPES[dtype]


class MetaCheckpoint(Checkpoint):
    """``consolidated.*.pth`` as Meta publishes Llama: one file for each model-parallel rank.

    Each tensor's pieces are put together along the dimension by which Meta's code splits it. A file
    is mapped as a whole, so what has been read of it counts as resident until loading is over.

    Args:
        folder (Path): The folder.

    Raises:
        CheckpointError: If a file is not a checkpoint that loads without running code from it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._parts = [_load_pth(path) for path in sorted(folder.glob("consolidated.*.pth"))]
        names = self._parts[0].keys()
        if "norm.weight" not in names or any(part.keys() != names for part in self._parts):
            raise CheckpointError(
                f"{folder}: its consolidated.*.pth are not the parts of one Llama; fetch them again"
            )

    @property
    def names(self) -> set[str]:
        return set(self._parts[0])

    def describe(self, names: Iterable[str]) -> dict[str, StoredTensor]:
        return {name: StoredTensor(self._shape(name), self._parts[0][name].dtype) for name in names}

    @contextmanager
    def read(self, name: str) -> Iterator[torch.Tensor]:
        dim = self._split_dim(name)
        pieces = [part[name] for part in self._parts]
        yield pieces[0] if dim is None else torch.cat(pieces, dim)

    def _split_dim(self, name: str) -> int | None:
        """Dimension along which the ranks of Meta's code split a tensor."""
        if len(self._parts) == 1 or name.endswith("norm.weight"):
            return None
        if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
            return 1
        if name == "tok_embeddings.weight":
            # By columns up to Llama 2, by rows since Llama 3: then it is as wide as the norm.
            part = self._parts[0]
            return 0 if part[name].shape[1] == part["norm.weight"].shape[0] else 1
        return 0

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = list(self._parts[0][name].shape)
        dim = self._split_dim(name)
        if dim is not None:
            shape[dim] = sum(part[name].shape[dim] for part in self._parts)
        return tuple(shape)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        FileNotFoundError: If there is none.
        CheckpointError: If it is corrupt.
    """
    if (folder / INDEX).is_file() or (folder / SINGLE).is_file():
        return SafetensorsCheckpoint(folder)
    if any(folder.glob("consolidated.*.pth")):
        return MetaCheckpoint(folder)
    raise FileNotFoundError(
        f"{folder}: no weights found; expected {INDEX}, {SINGLE} or consolidated.00.pth"
    )


def read_index(path: Path) -> dict[str, str]:
    """Name of each tensor → name of the file that holds it.

    Raises:
        CheckpointError: If the index is corrupt, or names a file outside of its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not an index: expected a JSON object with a weight_map ({error!r})"
        ) from error
    for file in files:
        if not isinstance(file, str) or not _stays_inside(file):
            raise CheckpointError(
                f"{path}: names the file {file!r}, which is not a .safetensors file in its folder"
            )
    return weight_map


def _stays_inside(file: str) -> bool:
    # It is the name that counts: in the Hub's cache the files themselves are links to blobs.
    posix, windows = PurePosixPath(file), PureWindowsPath(file)
    return (
        posix.suffix == ".safetensors"
        and not posix.is_absolute()
        and not windows.anchor
        and ".." not in windows.parts
    )


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file; fetch it again ({error})"
        ) from error
    with file:
        yield file


def _load_pth(path: Path) -> dict[str, torch.Tensor]:
    try:
        part = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: truncated, or not a checkpoint of plain tensors; fetch it again ({reason})"
        ) from error
    if not isinstance(part, dict) or not all(torch.is_tensor(t) for t in part.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors; fetch it again")
    # Some files carry the frequencies of RoPE, which follow from the config.
    return {name: tensor for name, tensor in part.items() if name != "rope.freqs"}
