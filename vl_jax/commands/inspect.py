"""``inspect``: what an experiment would run, shown without training; or what the routing of a run does."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config, load_experiment
from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser, required=False)
    parser.add_argument("what", choices=("config", "params", "data", "routing"))
    parser.add_argument("--workdir", type=Path, help="with routing, in place of --config: folder of a run")
    parser.add_argument("--batches", type=int, default=4, help="with routing: held-out batches to look at")
    parser.add_argument("--html", type=Path, help="with data: also write all of it as a page")
    parser.add_argument(
        "--examine",
        type=int,
        default=1000,
        help="with data: records examined of every source, and draws whose padding is counted",
    )
    parser.add_argument("--samples", type=int, default=3, help="with data: samples per source")


def run(arguments: argparse.Namespace) -> None:
    """Prints what was asked for.

    Raises:
      ConfigError: the option that names what to look at is missing.
    """
    if arguments.what == "routing":
        from vl_jax.report.routing import write_routing

        if arguments.workdir is None:
            raise ConfigError("inspect routing needs --workdir, the folder of a run")
        overrides = arguments.overrides
        print(write_routing(arguments.workdir, num_batches=arguments.batches, overrides=overrides))
        return
    from vl_jax.report import inspection

    if arguments.config is None:
        raise ConfigError(f"inspect {arguments.what} needs --config, an experiment file")
    inspection.show(
        load_experiment(arguments),
        arguments.what,
        samples=arguments.samples,
        examine=arguments.examine,
        html=arguments.html,
    )
