"""fetch_checkpoint: a checkpoint's folder, from the Hugging Face Hub if it is not a local one."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from torchtune_fused.checkpoint.adapter import WeightAdapter, owns
from torchtune_fused.checkpoint.files import INDEX, SINGLE, read_index
from torchtune_fused.models.config import load_model_config
from torchtune_fused.shard.shard import Shard

# What belongs to a model besides its weights and config; all of it is small.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class HubError(OSError):
    """A repository that could not be fetched from the Hub."""


def fetch_checkpoint(path_or_repo_id: str | Path, shard: Shard | None = None) -> Path:
    """The folder that holds a checkpoint.

    Of a repository, only the files that hold tensors of the shard are fetched, into the Hub's usual
    cache; those that are there already are not fetched again.

    Args:
        path_or_repo_id (str | Path): A folder, or else a repository, such as
            ``meta-llama/Llama-3.2-1B``.
        shard (Shard | None): The layers needed; None for all.

    Returns:
        Path: The folder.

    Raises:
        FileNotFoundError: If it is neither a folder nor could be the name of a repository.
        HubError: If the repository does not exist, is not open to you, or can't be reached.
        CheckpointError: If its index is corrupt.
        ConfigError: If its config is corrupt or not supported.
        ValueError: If the shard is not one of this model.
    """
    folder = fetch_side_files(path_or_repo_id)
    if Path(path_or_repo_id).expanduser().is_dir():
        return folder
    # The folder is named by its commit, which the weights must come from too.
    return _fetch(path_or_repo_id, _weight_files(folder, shard), revision=folder.name)


def fetch_side_files(path_or_repo_id: str | Path) -> Path:
    """The folder that holds a model's config and tokenizer; its weights need not be there.

    Args:
        path_or_repo_id (str | Path): As for :func:`fetch_checkpoint`.

    Returns:
        Path: The folder.

    Raises:
        FileNotFoundError: If it is neither a folder nor could be the name of a repository.
        HubError: If the repository does not exist, is not open to you, or can't be reached.
    """
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(path_or_repo_id, Path) or not _REPO_ID.fullmatch(path_or_repo_id):
        raise FileNotFoundError(f"{path_or_repo_id}: no such folder")
    return _fetch(path_or_repo_id, ["config.json", INDEX, *SIDE_FILES])


def _weight_files(folder: Path, shard: Shard | None) -> list[str]:
    index = folder / INDEX
    if not index.is_file():
        return [SINGLE]
    files = read_index(index)
    config = load_model_config(folder)
    shard = (shard or Shard.whole(config.model_id, config.num_layers)).of(config.num_layers)
    adapter = WeightAdapter.for_hf(config)
    wanted = set()
    for name, file in files.items():
        ours = adapter.our_name(name)
        if ours is not None and owns(shard, config, ours):
            wanted.add(file)
    return sorted(wanted)


def _fetch(repo_id: str, files: list[str], revision: str | None = None) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise HubError(
            f"{repo_id}: not a local folder, and could not be fetched from the Hub: {reason}"
        ) from error
