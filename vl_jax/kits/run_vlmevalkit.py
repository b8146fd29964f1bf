"""Starts VLMEvalKit with one of our models on its list; what stands behind ``--`` is the kit's own.

python -m vl_jax.kits.run_vlmevalkit --workdir=runs/mine -- --data MMBench_DEV_EN --mode all
"""

from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vl_jax.runtime import errors
from vl_jax.runtime.errors import UserError


def run(arguments: Sequence[str] | None = None) -> int:
    """Registers the model and hands over to the kit; a mistake of the user is one line, and gives 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options = vars(_parser().parse_args(given[:cut]))
    script, name = options.pop("run"), options.pop("name")
    kits = given[cut + 1 :]
    try:
        with errors.told():
            where = _prepare(script, name, {k: v for k, v in options.items() if v is not None})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not any(option.partition("=")[0] in ("--model", "--config") for option in kits):
        kits = ["--model", name, *kits]
    before, sys.argv = sys.argv, [str(where), *kits]
    try:
        runpy.run_path(str(where), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def _prepare(script: Path | None, name: str, options: dict[str, Any]) -> Path:
    """Puts the model on the kit's list; gives the kit's script."""
    if ("workdir" in options) == ("model" in options):
        raise UserError("give --workdir, the folder of a run, or --model, that of a published checkpoint")
    from vl_jax.kits import vlmevalkit

    where = script or _installed()
    if not where.is_file():
        raise UserError(f"--run={where}: no such file")
    vlmevalkit.prepare(name, **options)
    return where


def _installed() -> Path:
    """The script of the kit where it is installed as a package; a checkout has it beside the package."""
    spec = importlib.util.find_spec("vlmeval")
    places = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    for folder in places:
        for file in (folder / "run.py", folder.parent / "run.py"):
            if file.is_file():
                return file
    raise UserError("the kit's run.py is not beside its package: give --run, its path")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vl_jax.kits.run_vlmevalkit",
        description="VLMEvalKit with a vl_jax model. Its own options stand behind --",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", help="folder of a run")
    parser.add_argument("--model", help="folder of a published checkpoint")
    parser.add_argument("--name", default="vl_jax", help="of the model on the kit's list")
    parser.add_argument("--run", type=Path, help="the kit's run.py, where it is not found by itself")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a published checkpoint")
    parser.add_argument("--seed", type=int, help="of answers that are drawn")
    parser.add_argument(
        "--unanswerable", choices=("stop", "empty"), help="what follows a question that cannot be asked"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run())
