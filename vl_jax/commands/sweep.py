"""``sweep``: every variant that the sweeps of an experiment file name, compared on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser)
    parser.add_argument(
        "--sweep", required=True, metavar="A,B", help="names of sweeps; several: their product"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")


def run(arguments: argparse.Namespace) -> None:
    """Trains the variants that are not finished, and prints where the page is."""
    from vl_jax import sweep

    print(sweep.run(arguments.config, arguments.sweep.split(","), arguments.workdir, arguments.overrides))
