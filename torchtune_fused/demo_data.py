"""Real text that every machine has: what Python's standard library says about itself."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from typing import Any

from torchtune.datasets import PackedDataset, SFTDataset, alpaca_dataset

from torchtune_fused.cache import cache_dir

MODULES = ("os.path", "textwrap", "statistics", "shutil", "bisect", "heapq", "glob")


def docstring_dataset(tokenizer: Any, *, packed: bool = False) -> SFTDataset | PackedDataset:
    """A torchtune dataset of questions about functions of the standard library.

    Args:
        tokenizer (Any): A torchtune tokenizer.
        packed (bool): Whether to fill rows of ``tokenizer.max_seq_len`` with several samples each.

    Returns:
        SFTDataset | PackedDataset: the dataset; its answers are the functions' docstrings.
    """
    path = cache_dir() / "docstrings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: each writes a file of its own, and all write the same.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(docstrings(), file)
    os.replace(file.name, path)
    return alpaca_dataset(
        tokenizer, source="json", data_files=str(path), split="train", packed=packed
    )


def docstrings() -> list[dict[str, str]]:
    """Pairs of a question and an answer, in the form of the Alpaca dataset."""
    pairs = []
    for module in map(importlib.import_module, MODULES):
        for name in sorted(getattr(module, "__all__", dir(module))):
            function = getattr(module, name, None)
            answer = inspect.getdoc(function) if inspect.isroutine(function) else None
            if answer:
                question = f"What does {module.__name__}.{name} do in Python?"
                pairs.append({"instruction": question, "input": "", "output": answer})
    return pairs
