"""``fit``: rehearses the stages of an experiment on a TPU slice that is not here."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config, load_experiment
from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser)
    parser.add_argument("--topology", help="slice, such as v5p:4x4x4; v4, v5e, v5p, v6e or tpu7x")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape (1)")
    parser.add_argument("--stage", help="a stage by its name (the one that needs the most memory)")
    parser.add_argument("--no-compile", action="store_true", help="only what is exact without a compiler")
    parser.add_argument(
        "--thorough", action="store_true", help="compile with the effort of a run: slower, bytes to the last"
    )
    parser.add_argument("--search", action="store_true", help="rank meshes, micro-batches and remat")
    parser.add_argument("--smallest", action="store_true", help="the smallest slice of each generation")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--html", type=Path, help="file for the same as a page")


def run(arguments: argparse.Namespace) -> None:
    """Prints what the rehearsal found.

    Raises:
      ConfigError: options that do not go together.
    """
    if arguments.smallest == bool(arguments.topology):
        raise ConfigError("fit needs --topology, a slice such as v5p:4x4x4, or --smallest in place of it")
    if arguments.smallest and arguments.search:
        raise ConfigError("--search and --smallest: choose one of them")
    from vl_jax.report import fit

    fit.show(
        load_experiment(arguments),
        topology=arguments.topology,
        slices=arguments.slices,
        stage=arguments.stage,
        compiles=not arguments.no_compile,
        thorough=arguments.thorough,
        search=arguments.search,
        json_file=arguments.json,
        html=arguments.html,
    )
