"""``benchmark``: our figure and the rival's, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import load_experiment
from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "name",
        choices=(
            "step",
            "decode",
            "routing",
            "loader",
            "packing",
            "gate",
            "quantize",
            "windows",
            "checkpoint",
        ),
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="with loader and packing: experiment file")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--topology", help="with routing: compile for a TPU not here, e.g. v5e:2x4")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each side")


def run(arguments: argparse.Namespace) -> None:
    """Times, and prints the figures.

    Raises:
      ConfigError: options that do not go together.
    """
    of_data = arguments.name in ("loader", "packing")
    if not of_data and (arguments.config or arguments.overrides):
        raise ConfigError(f"benchmark {arguments.name} takes no --config: what it times is fixed")
    if of_data and arguments.config is None:
        raise ConfigError(f"benchmark {arguments.name} needs --config, an experiment file")
    if arguments.topology and arguments.name != "routing":
        raise ConfigError("--topology is for 'benchmark routing' alone")
    options = {"repeats": arguments.repeats, "json_file": arguments.json}
    if arguments.topology:
        from vl_jax.benchmarks import routing_aot

        routing_aot.run(arguments.topology, json_file=arguments.json)
    elif arguments.name == "routing":
        from vl_jax.benchmarks import routing

        routing.run(**options)
    elif arguments.name == "checkpoint":
        from vl_jax.benchmarks import checkpoint

        checkpoint.run(**options)
    elif arguments.name == "gate":
        from vl_jax.benchmarks import gate

        gate.run(**options)
    elif arguments.name == "windows":
        from vl_jax.benchmarks import windows

        windows.run(**options)
    elif arguments.name == "quantize":
        from vl_jax.benchmarks import quantize

        quantize.run(json_file=arguments.json)
    elif arguments.name == "loader":
        from vl_jax.benchmarks import loader

        loader.run(load_experiment(arguments), **options)
    elif arguments.name == "packing":
        from vl_jax.benchmarks import packing

        packing.run(load_experiment(arguments), **options)
    else:
        from vl_jax.benchmarks import step

        step.run(arguments.name, **options)
