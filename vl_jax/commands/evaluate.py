"""``evaluate``: held-out questions, asked of the newest checkpoint of a run or of a published one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vl_jax.config import load
from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run, or for the results")
    parser.add_argument("--model", type=Path, help="folder of a published checkpoint, with --config")
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="experiment file that says what --model is asked"
    )
    parser.add_argument("--task", action="append", default=[], help="name in config.data.evaluation; all")


def run(arguments: argparse.Namespace) -> None:
    """Prints the results as JSON.

    Raises:
      ConfigError: one of ``--model`` and ``--config`` is given without the other.
    """
    from vl_jax import runs

    if (arguments.model is None) != (arguments.config is None):
        raise ConfigError("--model and --config go together: the experiment file says what --model is asked")
    if arguments.model is None:
        results = runs.evaluate_run(arguments.workdir, arguments.task, arguments.overrides)
    else:
        overrides = (*arguments.overrides, ("init", str(arguments.model)))
        chosen = load(arguments.config, overrides)
        results = runs.evaluate_published(chosen, arguments.task, arguments.workdir)
    print(json.dumps(results, indent=2, ensure_ascii=False))
