"""``evaluate``: held-out questions or a published exam, asked of a run or of a published model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vl_jax.config import load
from vl_jax.schema import ConfigError

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", type=Path, help="folder of the run, or for the results of --model")
    parser.add_argument(
        "--model", type=Path, help="folder of a published checkpoint; with --config or --data"
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="experiment file that says what --model is asked"
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        help="name in config.data.evaluation; all. With --data: an exam, such as docvqa",
    )
    parser.add_argument("--data", metavar="FOLDER", type=Path, help="files of a published exam")
    parser.add_argument("--split", default="", help="of the exam")
    parser.add_argument(
        "--predictions", metavar="FILE", type=Path, help="score these, with --data; no model is asked"
    )
    parser.add_argument(
        "--stress",
        metavar="KIND[,KIND]",
        default="",
        help="sit the exam also with worse pictures: blur, noise, jpeg, resolution, or all",
    )
    parser.add_argument("--strengths", metavar="N[,N]", default="", help="of --stress, from 1 to 5; all")
    parser.add_argument(
        "--images", metavar="N[,N]", default="", help="sit the exam also with so many pictures in a prompt"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints the results as JSON.

    Raises:
      ConfigError: an option is missing, or goes with another one that is not given.
    """
    results = _exam(arguments) if arguments.data is not None else _held_out(arguments)
    print(json.dumps(results, indent=2, ensure_ascii=False))


def _held_out(arguments: argparse.Namespace) -> dict[str, Any]:
    from vl_jax import runs

    for name in ("split", "predictions", "stress", "strengths", "images"):
        if getattr(arguments, name):
            raise ConfigError(f"--{name} goes with --data, the folder of a published exam")
    if arguments.workdir is None:
        raise ConfigError("--workdir is required: the folder of the run, or for the results of --model")
    if (arguments.model is None) != (arguments.config is None):
        raise ConfigError("--model and --config go together: the experiment file says what --model is asked")
    if arguments.model is None:
        return runs.evaluate_run(arguments.workdir, arguments.task, arguments.overrides)
    overrides = (*arguments.overrides, ("init", str(arguments.model)))
    chosen = load(arguments.config, overrides)
    return runs.evaluate_published(chosen, arguments.task, arguments.workdir)


def _exam(arguments: argparse.Namespace) -> dict[str, Any]:
    from vl_jax.api import sitting
    from vl_jax.evaluate.exams.table import EXAMS, find_exam

    if len(arguments.task) != 1:
        raise ConfigError(f"--data needs one --task, one of {', '.join(EXAMS)}, or path/to/file.py:NAME")
    find_exam(arguments.task[0])
    if arguments.config is not None:
        raise ConfigError("--config and --data: an exam says itself what is asked; leave --config out")
    chosen = sitting.Sitting(
        arguments.task[0],
        arguments.data,
        arguments.split,
        stress=_kinds(arguments.stress),
        strengths=_numbers("strengths", arguments.strengths) or sitting.STRENGTHS,
        counts=_numbers("images", arguments.images),
    )
    if arguments.predictions is not None:
        if arguments.model or arguments.workdir or arguments.stress or arguments.images:
            raise ConfigError("--predictions: they are scored as they are, without --model and --workdir")
        return sitting.score_file(chosen, arguments.predictions, arguments.overrides)
    if arguments.model is not None:
        folder = arguments.workdir or Path("runs") / arguments.model.resolve().name
        return sitting.take_by_model(chosen, arguments.model, folder, arguments.overrides)
    if arguments.workdir is None:
        raise ConfigError("--data needs --workdir (a run), --model (a published folder) or --predictions")
    return sitting.take_by_run(chosen, arguments.workdir, arguments.overrides)


def _kinds(text: str) -> tuple[Any, ...]:
    """The kinds of stress of ``blur,jpeg``, or of ``all``."""
    from vl_jax import parts
    from vl_jax.evaluate.exams.stress import KINDS

    named = KINDS if text == ALL else tuple(dict.fromkeys(filter(None, text.split(","))))
    for name in named:
        if name not in KINDS:
            raise ConfigError(f"--stress={name}: no such kind; {parts.near(name, (*KINDS, ALL))}")
    return named


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of ``1,2,4``, each once."""
    words = list(filter(None, text.split(",")))
    if not all(word.strip().isdecimal() for word in words):
        raise ConfigError(f"--{option}={text}: expected whole numbers such as 1,2,4")
    return tuple(dict.fromkeys(map(int, words)))
