"""MappedSafetensors: the tensors of one file as views of its mapping."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

# Other dtypes (8-bit floats, integers, packed ones) are not weights to us.
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


class MappedSafetensors:
    """One safetensors file, mapped into memory once, privately.

    The library of the format checks the file, but gives no way to take back the memory of single
    tensors: it counts as resident for as long as any tensor of the file is in use. With a mapping
    of our own, weights that are used as stored stay where they are, as views, and the pages of
    those that were copied are given back at once. Memory peaks at what is kept plus one tensor.

    Args:
        path (Path): The file.

    Raises:
        CheckpointError: If it is missing, truncated or not a safetensors file, or holds a tensor
            of a dtype that we do not support.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing; fetch the checkpoint again")
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: truncated, or not a safetensors file; fetch it again ({error})"
            ) from error
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # The format: the header's size in 8 bytes, the header in JSON, the tensors' bytes.
        header_end = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:header_end])
        header.pop("__metadata__", None)
        self.tensors: dict[str, StoredTensor] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{path}: {name} has dtype {entry['dtype']}, which is not supported; "
                    f"supported: {', '.join(_DTYPES)}"
                )
            self.tensors[name] = StoredTensor(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            self._spans[name] = (header_end + start, header_end + end)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, as a view of the mapping, copied on write; it keeps the mapping alive."""
        stored = self.tensors[name]
        return torch.frombuffer(
            self._map,
            dtype=stored.dtype,
            count=math.prod(stored.shape),
            offset=self._spans[name][0],
        ).view(stored.shape)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory; they are read again if they are looked at again."""
        start, end = self._spans[name]
        # Inwards to whole pages, so that no page of a neighbour goes.
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end and hasattr(self._map, "madvise"):  # Windows has no such call
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
