"""``convert-data``: a source of an experiment to ArrayRecord files, images and all."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config, load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser)
    parser.add_argument("--source", required=True, help="name in config.data.sources or .evaluation")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="folder; appears when complete")
    parser.add_argument(
        "--shard", metavar="I/N", default="0/1", help="the share of this worker of several, from 0/N on"
    )


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints what was left out."""
    from vl_jax.api import conversion
    from vl_jax.data.tools.convert import Share

    share = Share.parse(arguments.shard)
    conversion.run(load_experiment(arguments), arguments.source, arguments.target, share)
