"""Checkpoint files: what tensors a folder holds, and each of them on its own, lazily."""

from __future__ import annotations

import json
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from torchtune_fused.checkpoint.mapped_safetensors import (
    CheckpointError,
    MappedSafetensors,
    StoredTensor,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored: a view of its mapped file, where one exists, copied on write."""

    def release(self, name: str) -> None:  # noqa: B027  optional
        """Give back the memory that reading a tensor took, once it has been copied."""


class SafetensorsCheckpoint(Checkpoint):
    """``model.safetensors``, or several files with an index.

    Args:
        folder (Path): The folder.

    Raises:
        CheckpointError: If the index is corrupt or names a file outside of the folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: dict[str, MappedSafetensors] = {}
        index = folder / INDEX
        if index.is_file():
            self._files = read_index(index)
        else:
            self._files = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def describe(self, names: Iterable[str]) -> dict[str, StoredTensor]:
        found = {name: self._open(self._files[name]).tensors.get(name) for name in names}
        return {name: stored for name, stored in found.items() if stored is not None}

    def read(self, name: str) -> torch.Tensor:
        return self._open(self._files[name]).read(name)

    def release(self, name: str) -> None:
        self._open(self._files[name]).release(name)

    def _open(self, file: str) -> MappedSafetensors:
        if file not in self._opened:
            self._opened[file] = MappedSafetensors(self.folder / file)
        return self._opened[file]


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

    def read(self, name: str) -> torch.Tensor:
        dim = self._split_dim(name)
        pieces = [part[name] for part in self._parts]
        return pieces[0] if dim is None else torch.cat(pieces, dim)

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
