"""What commands that take an experiment file have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl_jax.experiment import Experiment


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Adds ``--config`` to a command, and shows overrides in its usage."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE[:ARG]",
        help="experiment file, or the name of one of the package, such as quickstart",
    )
    parser.usage = f"{parser.prog} --config=FILE [--config.a.b=value ...] [options]"


def load_experiment(arguments: argparse.Namespace) -> Experiment:
    """The experiment of ``--config`` with the overrides applied, resolved.

    Raises:
      ConfigError: the file is wrong, or gives something else than an experiment.
    """
    from vl_jax.experiment import load

    return load(arguments.config, arguments.overrides)
