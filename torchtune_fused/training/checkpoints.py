"""Checkpoints of a run, of which at least one is always complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

_COMPLETE = re.compile(r"step_(\d+)")
_SAVING, _DELETING = ".saving-", ".deleting-"


class CheckpointFolder:
    """The checkpoints of a run: folders ``step_<number>``, each complete from when it is there.

    A checkpoint is written to a hidden folder, forced onto the disk and renamed. Only then are
    older ones deleted, after a rename to a hidden name. So whenever the process or the machine is
    stopped, every ``step_<number>`` is whole, and the last of them is there.

    Args:
        folder (Path): Where they are.
        keep (int): How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def newest(self) -> tuple[int, Path] | None:
        """Number of steps and folder of the newest checkpoint, None if there is none."""
        return max(self._complete(), default=None)

    def check(self) -> None:
        """Make the folder, if it is not there; raises an OSError if it can't be written to."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self._folder):
            pass

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Write a checkpoint: the body fills the folder it is given.

        Args:
            step (int): Steps done.

        Yields:
            Path: an empty folder. What is in it becomes the checkpoint, unless the body raises.
        """
        self._clean()
        scratch = self._folder / f"{_SAVING}step_{step}"
        scratch.mkdir(parents=True)
        try:
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                _sync(path)
            scratch.rename(self._folder / f"step_{step}")
            _sync(self._folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for _, path in sorted(self._complete())[: -self._keep]:
            path.rename(self._folder / f"{_DELETING}{path.name}")
        self._clean()

    def _complete(self) -> list[tuple[int, Path]]:
        if not self._folder.is_dir():
            return []
        found = ((_COMPLETE.fullmatch(path.name), path) for path in self._folder.iterdir())
        return [(int(match[1]), path) for match, path in found if match]

    def _clean(self) -> None:
        """Delete what no run needs any more, such as the traces of one that was killed."""
        for prefix in (_SAVING, _DELETING):
            for path in self._folder.glob(f"{prefix}*"):
                shutil.rmtree(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
