"""The command line: ``python -m vl_jax COMMAND``. A user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import threading
from collections.abc import Sequence

EXAMPLE = "python -m vl_jax train --config=experiments/quickstart.py --workdir=runs/quickstart"

# Every command, a file of its name in ``commands``: what it does, and an example.
COMMANDS = {
    "train": (
        "Train the stages of an experiment, evaluate, write report.html; resumes the run of the folder.",
        "train --config=experiments/quickstart.py --workdir=runs/quickstart --config.seed=1",
    ),
    "inspect": (
        "Show without training what would run: config, parameters, samples; or a run's routing.",
        "inspect params --config=experiments/quickstart.py",
    ),
    "sweep": (
        "Train every variant that the sweeps of an experiment file name, and compare them on one page.",
        "sweep --config=experiments/quickstart.py --sweep=scheme --workdir=runs/schemes",
    ),
    "evaluate": (
        "Answer held-out questions with the newest checkpoint of a run or a published one; print the scores.",
        "evaluate --workdir=runs/quickstart --task=heldout --config.evaluation.limit=100",
    ),
    "report": (
        "Write the page of a run, or of several, anew from their files.",
        "report --workdir=runs/quickstart",
    ),
    "generate": (
        "Answer a prompt about an image, with the newest checkpoint of a run or a published one.",
        "generate --workdir=runs/quickstart --image=scene.png --prompt='what colour is the circle?'",
    ),
    "convert": (
        "Convert a published folder (safetensors) to a checkpoint; or back, or a fine-tuned run.",
        "convert --from=deepseek-vl2-tiny --to=checkpoints/tiny",
    ),
    "conformance": (
        "Check a routing scheme of one's own: gradients, equivariance, masking, causality, kernels, devices.",
        "conformance experiments/my_router.py:my_router",
    ),
    "benchmark": (
        "Time a training step or decoding (beside transformers), routed experts (beside other ways), or an "
        "experiment's loader (beside Pillow and torch's DataLoader) or packed rows (beside a sample a row).",
        "benchmark step --json=step.json",
    ),
    "convert-data": (
        "Convert a source of an experiment to ArrayRecord files, images and all, and report what was "
        "left out; goes on where it was interrupted; with config.data.packing.index, measure lengths.",
        "convert-data --config=experiments/easy_vqa.py --source=train --to=data/easy_vqa",
    ),
    "tokenizer": (
        "Train a byte-level BPE vocabulary; the same input always gives the same file.",
        "tokenizer --input corpus.jsonl --vocab-size=2048 --out=tokenizer.json",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    from vl_jax.runtime import start
    from vl_jax.train.loop import Stopped

    start.set_up()
    try:
        arguments.run(arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """Runs the command of this process, and ends it, even if a thread that reads data is stuck."""
    from vl_jax.data.stream.background import DATA_THREAD

    status = main()
    if any(thread.name.startswith(DATA_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vl_jax", description=__doc__, epilog=f"example: {EXAMPLE}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, example) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            epilog=f"example: python -m vl_jax {example}",
            allow_abbrev=False,
        )
        command.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
        if name in argv:  # the options of a command are in its file, which need not be read for another one
            module = importlib.import_module(f"vl_jax.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = _overrides(parser, rest)
    return arguments


def _overrides(parser: argparse.ArgumentParser, rest: list[str]) -> tuple[tuple[str, str], ...]:
    """``--config.a.b=value`` or ``--config.a.b value`` to pairs of dotted path and text."""
    pairs, queue = [], list(rest)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--config."):
            parser.error(f"unknown argument {word!r}; overrides look like --config.model.moe.top_k=4")
        path, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            if not queue:
                parser.error(f"{word} needs a value")
            text = queue.pop(0)
        pairs.append((path, text))
    return tuple(pairs)
