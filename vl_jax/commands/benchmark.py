"""``benchmark``: our figure and the rival's, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import load_experiment
from vl_jax.schema import ConfigError

# Sizes of the layer that ``routing`` measures; see ``benchmarks.routing.Shape``.
SIZES = {
    "num_experts": "experts (E)",
    "top_k": "experts of a token (k)",
    "tokens": "tokens of one device (T)",
    "width": "width of a token (d)",
    "hidden": "width of an expert (F)",
}


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
    parser.add_argument("--slices", type=int, help="with --topology: how many of that slice")
    for name, what in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"with routing: {what}")
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
    sizes = {name: getattr(arguments, name) for name in SIZES}
    if arguments.name != "routing" and any(value is not None for value in sizes.values()):
        raise ConfigError(f"sizes of a layer are for 'benchmark routing' alone, not for {arguments.name}")
    if arguments.slices is not None and (arguments.slices < 1 or not arguments.topology):
        raise ConfigError(f"--slices={arguments.slices} must be at least 1, and goes with --topology")
    options = {"repeats": arguments.repeats, "json_file": arguments.json}
    if arguments.name == "routing":
        _routing(arguments, sizes)
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


def _routing(arguments: argparse.Namespace, sizes: dict[str, int | None]) -> None:
    """The layer of experts: timed here, or compiled for a TPU that is not."""
    import jax

    from vl_jax.benchmarks import routing

    shape = routing.shape_of(sizes, platform="tpu" if arguments.topology else jax.default_backend())
    shapes = () if shape is None else (shape,)
    if arguments.topology:
        from vl_jax.benchmarks import routing_aot

        slices = arguments.slices or 1
        routing_aot.run(arguments.topology, slices=slices, json_file=arguments.json, shapes=shapes)
    else:
        routing.run(repeats=arguments.repeats, json_file=arguments.json, shapes=shapes)
