"""Command line of the recipes: a config, overrides, and errors of one line."""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config
from torchtune.config._errors import ConfigError, InstantiationError

import torchtune_fused.configs
from torchtune_fused.shard.pipeline import RankError

# What a wrong path or value ends in. Anything else is a bug, and keeps its traceback.
_USER_ERRORS = (
    ValueError,
    OSError,
    yaml.YAMLError,
    OmegaConfBaseException,
    ConfigError,
    InstantiationError,
    RankError,
)


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorate a recipe's main function: like ``torchtune.config.parse``, and kinder.

    - ``--config`` also takes the name of a config of this package, from any folder:
      ``smollm2_135m/generate`` or ``configs/smollm2_135m/generate.yaml``.
    - An override of a key that holds text in the config is taken as it stands, whatever YAML
      would make of it: ``prompt="1 + 1 = ?"``. ``null`` still empties it, a component as well.
    - An override of a key that the config does not have is an error.
    - A wrong path or value ends the program with one line and exit status 1.

    Args:
        recipe_main (Callable[[DictConfig], Any]): Takes the merged config. Its docstring is what
            ``--help`` prints.

    Returns:
        Callable[[], None]: the main function, without arguments; it reads ``sys.argv`` and exits.
    """

    @functools.wraps(recipe_main)
    def main() -> None:
        taken_out: dict[str, Any] = {}

        @functools.wraps(recipe_main)
        def run(cfg: DictConfig) -> Any:
            for key, value in taken_out.items():
                OmegaConf.update(cfg, key, value)
            return recipe_main(cfg)

        arguments = sys.argv
        try:
            if "--config" in arguments[1:-1] and not {"-h", "--help"} & set(arguments):
                sys.argv, taken_out = _prepare(arguments)
            config.parse(run)()
        except _USER_ERRORS as error:
            sys.exit(f"{_rank()}error: {' '.join(str(error).split())}")
        finally:
            sys.argv = arguments

    return main


def find_config(name: str) -> Path:
    """Find a config file: the path as given, or else a config of this package by its name.

    Raises:
        FileNotFoundError: If there is neither; it lists the package's configs.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = Path(torchtune_fused.configs.__file__).parent
    relative = Path(name.removeprefix("torchtune_fused/").removeprefix("configs/"))
    packaged = folder / relative.with_suffix(".yaml")
    if packaged.is_file():
        return packaged
    names = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))
    raise FileNotFoundError(
        f"no config {name!r}: no such file, and the package has {', '.join(names)}"
    )


def expand_path(text: str) -> str:
    """Expand ``~`` and ``$VARIABLES`` in a path of a config.

    Raises:
        ValueError: If it is not text.
    """
    if not isinstance(text, str):
        raise ValueError(f"expected a path, got {text!r}")
    return os.path.expanduser(os.path.expandvars(text))


def check_count(key: str, value: Any, *, optional: bool = False) -> Any:
    """The value of a key that counts something, or is null if ``optional``; else a ValueError."""
    if not (type(value) is int and value >= 1) and not (optional and value is None):
        null = " or null" if optional else ""
        raise ValueError(f"{key} must be an integer >= 1{null}, got {value!r}")
    return value


def check_flags(section: Mapping[str, Any], *keys: str) -> None:
    """Raise a ValueError if one of these keys is neither true nor false."""
    for key in keys:
        if type(section[key]) is not bool:
            raise ValueError(f"{key} must be true or false, got {section[key]!r}")


def check_seed(seed: Any) -> None:
    """Raise a ValueError if a seed is not an integer that every generator takes."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")


def _prepare(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Point ``--config`` at a file, and take out the overrides that torchtune would misread."""
    at = argv.index("--config") + 1
    path = find_config(argv[at])
    defaults = OmegaConf.load(path)
    if not isinstance(defaults, DictConfig):
        raise ValueError(f"{path} must hold keys and values")
    kept, taken_out = [*argv[:at], str(path)], {}
    for argument in [*argv[1 : at - 1], *argv[at + 1 :]]:
        key, equals, value = argument.partition("=")
        if not equals and not argument.startswith(("~", "--")):
            raise ValueError(f"expected key=value, got {argument!r} (quote values with spaces)")
        name = key.removeprefix("~").partition(".")[0]
        if not key.startswith("--") and name not in defaults:
            raise ValueError(f"the config has no {name!r}; it has {', '.join(map(str, defaults))}")
        taken_out.pop(key, None)  # of several values for a key, the last one counts
        if equals and value in ("null", "None"):
            taken_out[key] = None  # torchtune would empty no more than a component's name
        elif equals and _holds_text(defaults, key):
            # What looks like an interpolation is meant as text as well.
            taken_out[key] = value.replace("${", "\\${")
        elif "=" in value:
            taken_out[key] = OmegaConf.select(OmegaConf.from_dotlist([argument]), key)
        else:
            kept.append(argument)
    return kept, taken_out


def _holds_text(defaults: DictConfig, key: str) -> bool:
    node: Any = OmegaConf.to_container(defaults, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return isinstance(node, str)


def _rank() -> str:
    rank = os.environ.get("RANK")
    return f"[rank {rank}] " if rank is not None else ""
