"""Real text that every machine has: what Python's standard library says about itself."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import tempfile
from typing import Any

from torchtune.datasets import PackedDataset, SFTDataset, instruct_dataset

from torchtune_fused.cache import cache_dir

_MODULES = ("os.path", "shutil", "textwrap", "statistics", "heapq", "glob", "fnmatch")


def docstring_dataset(tokenizer: Any, *, packed: bool = False) -> SFTDataset | PackedDataset:
    """A torchtune dataset of questions about functions of the standard library.

    Args:
        tokenizer (Any): A torchtune tokenizer with a chat template.
        packed (bool): Whether to fill rows of ``tokenizer.max_seq_len`` with several samples each.

    Returns:
        SFTDataset | PackedDataset: the dataset; its answers are how the docstrings begin.
    """
    path = cache_dir() / "docstrings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: each writes a file of its own, and all write the same.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(docstrings(), file)
    os.replace(file.name, path)
    return instruct_dataset(
        tokenizer, source="json", data_files=str(path), split="train", packed=packed
    )


def docstrings() -> list[dict[str, str]]:
    """Pairs of a question (``input``) and the first paragraph of a docstring (``output``)."""
    pairs = []
    for module_name in _MODULES:
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            function = getattr(module, name)
            if inspect.isroutine(function) and (text := inspect.getdoc(function)):
                question = f"What does {module_name}.{name} do in Python?"
                answer = " ".join(text.partition("\n\n")[0].split())
                pairs.append({"input": question, "output": answer})
    return pairs
