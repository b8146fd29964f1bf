"""``new``: an experiment of the package as a file of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.runtime import shipped
from vl_jax.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("file", type=Path, metavar="FILE.py", help="must not exist")
    parser.add_argument(
        "--from",
        dest="source",
        default="quickstart",
        choices=shipped.names(),
        help="an experiment that comes with the package; quickstart by default",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file, and prints the command that trains it.

    Raises:
      UserError: the file exists, or is no Python file.
    """
    target, name = arguments.file, arguments.source
    if target.suffix != ".py":
        raise UserError(f"{target}: an experiment is a Python file; call it {target}.py")
    text = shipped.path_of(name).read_text(encoding="utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("x", encoding="utf-8") as file:
            # What the text says of itself stays true.
            file.write(text.replace(f"experiments/{name}.py", target.as_posix()))
    except FileExistsError:
        raise UserError(f"{target} exists already; choose another name") from None
    print(f"{target}: a copy of {name}; train it with")
    print(f"  python -m vl_jax train --config={target} --workdir=runs/{target.stem}")
