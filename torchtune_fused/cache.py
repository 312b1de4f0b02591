"""Where the package keeps what it makes between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The package's folder in the user's cache: ``$XDG_CACHE_HOME/torchtune-fused``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "torchtune-fused")
