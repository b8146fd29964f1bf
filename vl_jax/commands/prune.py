"""``prune``: a trained run with fewer experts, the least harmful ones left out or merged into others."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="folder of the smaller run")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts of every layer (0.25)")
    parser.add_argument("--merge", action="store_true", help="merge them into the others, weighted by use")
    parser.add_argument("--random", type=int, metavar="SEED", help="take random ones, to compare with")
    parser.add_argument("--batches", type=int, default=4, help="held-out batches of the knock-out table (4)")


def run(arguments: argparse.Namespace) -> None:
    """Prunes, and prints the folder that was made."""
    from vl_jax.api import pruning

    print(
        pruning.prune(
            arguments.workdir,
            arguments.target,
            share=arguments.share,
            merge=arguments.merge,
            random=arguments.random,
            num_batches=arguments.batches,
        )
    )
