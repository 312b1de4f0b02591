"""The ``torchtune-fused`` command: ``doctor``, ``build`` and ``cp``."""

import argparse
import shutil
import sys
from importlib.resources import files
from pathlib import Path

from torchtune_fused.build import add_build_arguments, build_command


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"torchtune-fused {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchtune-fused", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="say whether this machine can run the package, and what to do if not"
    )
    doctor.set_defaults(run=_doctor)

    build = commands.add_parser("build", help="compile the CUDA kernels (no GPU needed)")
    add_build_arguments(build)
    build.set_defaults(run=build_command)

    copy = commands.add_parser("cp", help="copy a recipe or config of the package to edit it")
    copy.add_argument(
        "source",
        nargs="?",
        help="recipe (generate.py) or config (smollm2_135m/generate.yaml); omit it to list them",
    )
    copy.add_argument("destination", nargs="?", default=".", help="file or folder (default: here)")
    copy.add_argument("-f", "--force", action="store_true", help="overwrite an existing file")
    copy.set_defaults(run=_copy)
    return parser


def _doctor(args: argparse.Namespace) -> int:
    from torchtune_fused.doctor import examine

    checks = examine()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.mark} {check.name:<{width}}  {check.found}")
        if check.advice:
            print(f"  {'':<{width}}  -> {check.advice}")
    usable = all(check.usable for check in checks)
    print("\nusable" if usable else "\nnot usable: see the arrows above")
    return 0 if usable else 1


def _copy(args: argparse.Namespace) -> int:
    package = {kind: Path(str(files(f"torchtune_fused.{kind}"))) for kind in ("recipes", "configs")}
    shipped = {
        str(path.relative_to(folder)): path
        for folder, pattern in ((package["recipes"], "*.py"), (package["configs"], "*/*.yaml"))
        for path in sorted(folder.glob(pattern))
        if path.name != "__init__.py"
    }
    if args.source is None:
        print("\n".join(shipped))
        return 0
    name = args.source.removeprefix("recipes/").removeprefix("configs/")
    if name not in shipped:
        raise ValueError(
            f"no recipe or config is called {args.source!r}; `torchtune-fused cp` lists them"
        )
    target = Path(args.destination)
    if target.is_dir():
        target /= shipped[name].name
    if target.exists() and not args.force:
        raise ValueError(f"{target} exists; --force overwrites it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(shipped[name], target)
    print(f"copied {name} to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
