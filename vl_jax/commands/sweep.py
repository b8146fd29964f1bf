"""``sweep``: the variants that sweeps of a file name, an ablation, or a scaling curve, on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config
from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser)
    parser.add_argument(
        "--sweep",
        metavar="A,B",
        help="names of sweeps (several: their product), or of one ablation or scaling curve",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="runs at once, each in a process of its own (1)"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="seeds of every variant, or of an arm in place of its own"
    )
    parser.add_argument(
        "--together",
        type=int,
        metavar="N",
        help="of the same, seeds of an arm that train as one program (all; 1: one after another)",
    )
    parser.add_argument("--list", action="store_true", help="say what there is to run, and run nothing")


def run(arguments: argparse.Namespace) -> None:
    """Trains the variants that are not finished, and prints where the page is.

    Raises:
      ConfigError: an option is wrong.
      UserError: runs failed, or what an ablation declared did not come true.
    """
    from vl_jax import sweep

    spec, workdir = arguments.config, arguments.workdir
    if arguments.parallel < 1:
        raise ConfigError(f"--parallel={arguments.parallel} must be >= 1")
    if arguments.together is not None and arguments.together < 1:
        raise ConfigError(f"--together={arguments.together} must be >= 1")
    if arguments.parallel > 1 and (arguments.together or 1) > 1:
        raise ConfigError(
            f"--parallel={arguments.parallel} runs every seed in a process of its own, and "
            f"--together={arguments.together} several in one; give one of them"
        )
    names = sweep.names_of(spec, arguments.sweep)
    if _run_declared(arguments, names):
        return
    if arguments.together is not None:
        raise ConfigError(f"--together={arguments.together} is for ablations and scaling curves")
    if (seeds := arguments.seeds) is not None and seeds < 1:
        raise ConfigError(f"--seeds={seeds} must be >= 1")
    if arguments.list:
        print(sweep.listing(sweep.jobs_of(spec, names, workdir, arguments.overrides, seeds=seeds)))
        return
    options = {"parallel": arguments.parallel, "seeds": seeds}
    print(sweep.run(spec, names, workdir, arguments.overrides, **options))


def _run_declared(arguments: argparse.Namespace, names: list[str]) -> bool:
    """Runs or lists what is named, and says so; False if it is neither an ablation nor a scaling curve."""
    from vl_jax import sweep
    from vl_jax.ablation import ablation, page
    from vl_jax.ablation.scaling import page as scaling_page

    given = (arguments.config, names[0])
    options = (arguments.workdir, arguments.overrides)
    if (declared := sweep.find_ablation(arguments.config, names)) is not None:
        launched = sweep.launch(*given, declared, *options, seeds=arguments.seeds)
        curve, conclude = None, page.conclude
    elif (curve := sweep.find_scaling(arguments.config, names)) is not None:
        launched, curve = sweep.launch_scaling(*given, curve, *options, seeds=arguments.seeds)
        conclude = scaling_page.conclude
    else:
        return False
    if arguments.list:
        print(ablation.listing(launched))
        return True
    if curve is not None:
        sweep.keep_scaling(launched, curve)
    launched.run(parallel=arguments.parallel, together=arguments.together or 0)
    conclude(arguments.workdir)
    return True
