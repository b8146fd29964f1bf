"""``report``: the page of a run, of several, of an ablation or of a scaling curve, from their files."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.runtime.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", type=Path, help="folder of a run, or one that holds runs")
    parser.add_argument(
        "--columns",
        metavar="A,B",
        help="with several runs: patterns of the columns to show, such as 'loss,routing/*'",
    )
    parser.add_argument(
        "--records",
        type=Path,
        metavar="DIR",
        help="in place of --workdir: folder of records of ablations, of which it writes RESULTS.md beside it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and prints where it is.

    Raises:
      UserError: the folder holds neither a run nor runs, or what was declared did not hold.
    """
    from vl_jax.ablation import page, records
    from vl_jax.ablation.scaling import page as scaling_page
    from vl_jax.ablation.scaling.declared import is_scaling
    from vl_jax.ablation.state import is_ablation
    from vl_jax.report.comparison import is_collection, write_comparison
    from vl_jax.report.run import is_run, write_report

    folder = arguments.workdir
    if (folder is None) == (arguments.records is None):
        raise UserError("report needs either --workdir, the folder of a run or of runs, or --records")
    if folder is None:
        print(records.write(arguments.records))
        return
    columns = arguments.columns.split(",") if arguments.columns else ()
    if is_scaling(folder):
        if columns:
            raise UserError(f"--columns={arguments.columns}: {folder} is a scaling curve, which has its own")
        scaling_page.conclude(folder)
        return
    if is_ablation(folder):
        page.conclude(folder, columns)
        return
    if folder.is_dir() and not is_run(folder) and not is_collection(folder):
        raise UserError(
            f"--workdir={folder} holds no run, nor folders of runs (a run has config.json, metrics.jsonl and "
            "eval/); give the --workdir of train, or that of sweep"
        )
    if is_collection(folder):
        print(write_comparison(folder, columns))
        return
    if columns:
        raise UserError(f"--columns={arguments.columns}: {folder} is one run; columns are of several")
    print(write_report(folder))
