"""``report``: the page of a run, or of several, written anew from their files."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a run, or one that holds runs")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and prints where it is.

    Raises:
      UserError: the folder holds neither a run nor runs.
    """
    from vl_jax.report.comparison import is_collection, write_comparison
    from vl_jax.report.run import is_run, write_report

    folder = arguments.workdir
    if folder.is_dir() and not is_run(folder) and not is_collection(folder):
        raise UserError(
            f"--workdir={folder} holds no run, nor folders of runs (a run has config.json, metrics.jsonl and "
            "eval/); give the --workdir of train, or that of sweep"
        )
    write = write_comparison if is_collection(folder) else write_report
    print(write(folder))
