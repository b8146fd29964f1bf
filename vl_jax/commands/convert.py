"""``convert``: a published folder to a checkpoint, or back, or a fine-tuned run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--from", dest="source", required=True, type=Path, help="what to convert")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="must not exist")


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints the folder that was made."""
    if (arguments.source / "metrics.jsonl").is_file():  # a run, which began with a published one
        from vl_jax.runs import export

        export(arguments.source, arguments.target)
    else:
        from vl_jax.interop.convert import convert

        convert(arguments.source, arguments.target)
    print(arguments.target)
