"""``inspect``: what an experiment would run, shown without training; or what the routing of a run does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vl_jax.commands.experiment_file import add_config, load_experiment
from vl_jax.schema import ConfigError

if TYPE_CHECKING:
    from vl_jax.sharding import MeshConfig

# Which of the options each kind reads.
_READS = {
    "config": ("config",),
    "params": ("config", "html", "mesh"),
    "data": ("config", "html", "examine", "samples"),
    "routing": ("workdir", "batches", "capacity"),
}
_OPTIONS = ("config", "workdir", "batches", "capacity", "html", "examine", "samples", "mesh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser, required=False)
    parser.add_argument("what", choices=tuple(_READS))
    parser.add_argument("--workdir", type=Path, help="with routing, in place of --config: folder of a run")
    parser.add_argument("--batches", type=int, help="with routing: held-out batches to look at (4)")
    parser.add_argument(
        "--capacity",
        action="store_const",
        const=True,
        help="with routing: also the loss with fewer and with more slots of an expert",
    )
    parser.add_argument("--html", type=Path, help="with data or params: also write it as a page")
    parser.add_argument(
        "--mesh", help="with params: devices that need not be here, such as data=2,fsdp=64 (config.mesh)"
    )
    parser.add_argument(
        "--examine",
        type=int,
        help="with data: records examined of every source, and draws whose padding is counted (1000)",
    )
    parser.add_argument("--samples", type=int, help="with data: samples per source (3)")
    parser.usage = (
        f"{parser.prog} config|params|data --config=FILE [--config.a.b=value ...] [options]\n"
        f"       {parser.prog} routing --workdir=DIR [--config.data.a=value ...] [options]"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints what was asked for.

    Raises:
      ConfigError: the option that names what to look at is missing, or one is given that is not read.
    """
    what = arguments.what
    for name in _OPTIONS:
        if getattr(arguments, name) is not None and name not in _READS[what]:
            reads = ", ".join(f"--{read}" for read in _READS[what])
            raise ConfigError(f"inspect {what} does not read --{name}; it reads {reads}")
    if what == "routing":
        from vl_jax.report.routing import write_routing

        if arguments.workdir is None:
            raise ConfigError("inspect routing needs --workdir, the folder of a run")
        batches = 4 if arguments.batches is None else arguments.batches
        options = {"num_batches": batches, "capacity": bool(arguments.capacity)}
        print(write_routing(arguments.workdir, overrides=arguments.overrides, **options))
        return
    from vl_jax.report import inspection

    if arguments.config is None:
        raise ConfigError(f"inspect {what} needs --config, an experiment file")
    inspection.show(
        load_experiment(arguments),
        what,
        samples=3 if arguments.samples is None else arguments.samples,
        examine=1000 if arguments.examine is None else arguments.examine,
        html=arguments.html,
        mesh=None if arguments.mesh is None else _mesh(arguments.mesh),
    )


def _mesh(text: str) -> MeshConfig:
    from vl_jax.sharding import mesh_of

    try:
        return mesh_of(text)
    except ValueError as error:
        raise ConfigError(f"--mesh={error}") from None
