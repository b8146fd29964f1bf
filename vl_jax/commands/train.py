"""``train``: the stages of an experiment, its evaluation and its report."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.commands.experiment_file import add_config, load_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_config(parser)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    parser.add_argument(
        "--profile", metavar="STEPS", default="", help="steps to trace, such as 10-12; into WORKDIR/profile"
    )


def run(arguments: argparse.Namespace) -> None:
    """Trains or resumes, and prints the scores of every task, its headline first."""
    from vl_jax import runs
    from vl_jax.report.results import summary

    experiment, began = load_experiment(arguments), arguments.began
    results = runs.run(experiment, arguments.workdir, profile=arguments.profile, began=began)
    for task, result in results.items():
        print(f"{task}: {summary(result)}")
    print(f"report: {arguments.workdir / 'report.html'}")
