"""``report``: the page of a run, or of several, written anew from their files."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", required=True, type=Path)


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and prints where it is."""
    from vl_jax.report.comparison import is_collection, write_comparison
    from vl_jax.report.run import write_report

    write = write_comparison if is_collection(arguments.workdir) else write_report
    print(write(arguments.workdir))
