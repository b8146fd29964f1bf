"""The command line: ``python -m vl_jax COMMAND``. A user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vl_jax.config import ConfigError, load

EXAMPLE = "python -m vl_jax train --config=experiments/quickstart.py --workdir=runs/quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    arguments = _parse(list(sys.argv[1:] if argv is None else argv))
    from vl_jax import process
    from vl_jax.train.loop import Stopped

    process.set_up()
    try:
        arguments.run(arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


Command = Callable[[str, Callable[[Any], None], str, str], argparse.ArgumentParser]


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="vl_jax", description=__doc__, epilog=f"example: {EXAMPLE}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], None], help: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example: python -m vl_jax {example}",
            allow_abbrev=False,
        )
        sub.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
        sub.set_defaults(run=run)
        return sub

    _add_runs(command)
    _add_models(command)
    _add_tools(command)
    arguments, rest = parser.parse_known_args(argv)
    arguments.overrides = _overrides(parser, rest)
    return arguments


def _with_config(sub: argparse.ArgumentParser, *, required: bool = True) -> argparse.ArgumentParser:
    sub.add_argument("--config", required=required, metavar="FILE[:ARG]", help="experiment file")
    sub.usage = f"{sub.prog} --config=FILE [--config.a.b=value ...] [options]"
    return sub


def _add_runs(command: Command) -> None:
    """Commands about runs of an experiment."""
    train = _with_config(
        command(
            "train",
            _train,
            "Train the stages of an experiment, evaluate, write report.html; resumes the run of the folder.",
            "train --config=experiments/quickstart.py --workdir=runs/quickstart --config.seed=1",
        )
    )
    train.add_argument("--workdir", required=True, type=Path, help="folder of the run")
    inspect = _with_config(
        command(
            "inspect",
            _inspect,
            "Show without training what would run: config, parameters, samples; or a run's routing.",
            "inspect params --config=experiments/quickstart.py",
        ),
        required=False,
    )
    inspect.add_argument("what", choices=("config", "params", "data", "routing"))
    inspect.add_argument("--workdir", type=Path, help="with routing, in place of --config: folder of a run")
    inspect.add_argument("--batches", type=int, default=4, help="with routing: held-out batches to look at")
    inspect.add_argument("--html", type=Path, help="with data: also write all of it as a page")
    inspect.add_argument(
        "--examine",
        type=int,
        default=1000,
        help="with data: records examined of every source, and draws whose padding is counted",
    )
    inspect.add_argument("--samples", type=int, default=3, help="with data: samples per source")
    sweep = _with_config(
        command(
            "sweep",
            _sweep,
            "Train every variant that the sweeps of an experiment file name, and compare them on one page.",
            "sweep --config=experiments/quickstart.py --sweep=scheme --workdir=runs/schemes",
        )
    )
    sweep.add_argument(
        "--sweep", required=True, metavar="A,B", help="names of sweeps; several: their product"
    )
    sweep.add_argument("--workdir", required=True, type=Path, help="folder of the runs")
    evaluate = command(
        "evaluate",
        _evaluate,
        "Answer held-out questions with the newest checkpoint of a run or a published one; print the scores.",
        "evaluate --workdir=runs/quickstart --task=heldout --config.evaluation.limit=100",
    )
    evaluate.add_argument("--workdir", required=True, type=Path, help="folder of the run, or for the results")
    evaluate.add_argument("--model", type=Path, help="folder of a published checkpoint, with --config")
    evaluate.add_argument(
        "--config", metavar="FILE[:ARG]", help="experiment file that says what --model is asked"
    )
    evaluate.add_argument("--task", action="append", default=[], help="name in config.data.evaluation; all")
    report = command(
        "report",
        _report,
        "Write the page of a run, or of several, anew from their files.",
        "report --workdir=runs/quickstart",
    )
    report.add_argument("--workdir", required=True, type=Path)


def _add_models(command: Command) -> None:
    """Commands that use or move a model that is there."""
    generate = command(
        "generate",
        _generate,
        "Answer a prompt about an image, with the newest checkpoint of a run or a published one.",
        "generate --workdir=runs/quickstart --image=scene.png --prompt='what colour is the circle?'",
    )
    where = generate.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, help="folder of a run")
    where.add_argument("--model", type=Path, help="folder of a published checkpoint")
    generate.add_argument("--image", type=Path, help="without one, the prompt stands alone")
    generate.add_argument("--audio", type=Path, help="a sound, with a run that was trained on some")
    generate.add_argument("--prompt", required=True)
    generate.add_argument(
        "--draw", type=Path, metavar="PNG", help="where the image goes, with the boxes named"
    )
    generate.add_argument("--max-new-tokens", type=int, default=32)
    convert = command(
        "convert",
        _convert,
        "Convert a published folder (safetensors) to a checkpoint; or back, or a fine-tuned run.",
        "convert --from=deepseek-vl2-tiny --to=checkpoints/tiny",
    )
    convert.add_argument("--from", dest="source", required=True, type=Path, help="what to convert")
    convert.add_argument("--to", dest="target", required=True, type=Path, help="must not exist")


def _add_tools(command: Command) -> None:
    """Commands that need no model: schemes, figures, vocabularies."""
    conformance = command(
        "conformance",
        _conformance,
        "Check a routing scheme of one's own: gradients, equivariance, masking, causality, kernels, devices.",
        "conformance experiments/my_router.py:my_router",
    )
    conformance.add_argument("scheme", metavar="FILE:NAME", help="or the name of a built-in scheme")
    benchmark = command(
        "benchmark",
        _benchmark,
        "Time a training step or decoding (beside transformers), routed experts (beside other ways), or an "
        "experiment's loader (beside Pillow and torch's DataLoader) or packed rows (beside a sample a row).",
        "benchmark step --json=step.json",
    )
    benchmark.add_argument("name", choices=("step", "decode", "routing", "loader", "packing"))
    benchmark.add_argument("--config", metavar="FILE[:ARG]", help="with loader and packing: experiment file")
    benchmark.add_argument("--json", type=Path, help="file for the figures")
    benchmark.add_argument("--topology", help="with routing: compile for a TPU not here, e.g. v5e:2x4")
    benchmark.add_argument("--repeats", type=int, default=9, help="turns of each side")
    data = _with_config(
        command(
            "convert-data",
            _convert_data,
            "Convert a source of an experiment to ArrayRecord files, images and all, and report what was "
            "left out; goes on where it was interrupted; with config.data.packing.index, measure lengths.",
            "convert-data --config=experiments/easy_vqa.py --source=train --to=data/easy_vqa",
        )
    )
    data.add_argument("--source", required=True, help="name in config.data.sources or .evaluation")
    data.add_argument("--to", dest="target", required=True, type=Path, help="folder; appears when complete")
    tokenizer = command(
        "tokenizer",
        _tokenizer,
        "Train a byte-level BPE vocabulary; the same input always gives the same file.",
        "tokenizer --input corpus.jsonl --vocab-size=2048 --out=tokenizer.json",
    )
    tokenizer.add_argument(
        "--input", required=True, nargs="+", help="text files, or JSONL with a 'text' field"
    )
    tokenizer.add_argument("--vocab-size", type=int, default=2048)
    tokenizer.add_argument("--out", required=True, type=Path)


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


def _load(arguments: argparse.Namespace) -> Any:
    from vl_jax.experiment import Experiment, resolve

    experiment = load(arguments.config, arguments.overrides)
    if not isinstance(experiment, Experiment):
        raise ConfigError(f"--config={arguments.config}: get_config() gave no Experiment")
    return resolve(experiment)


def _train(arguments: argparse.Namespace) -> None:
    from vl_jax import experiment

    results = experiment.run(_load(arguments), arguments.workdir)
    for task, result in results.items():
        print(
            f"{task}: exact match {result['exact_match']:.1%} on {result['num_questions']} questions "
            f"(blind {result['blind_exact_match']:.1%}, prior {result['prior_exact_match']:.1%})"
        )
    print(f"report: {arguments.workdir / 'report.html'}")


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.what == "routing":
        from vl_jax import routing_page

        if arguments.workdir is None:
            raise ConfigError("inspect routing needs --workdir, the folder of a run")
        overrides = arguments.overrides
        print(
            routing_page.write_routing(arguments.workdir, num_batches=arguments.batches, overrides=overrides)
        )
        return
    from vl_jax import inspection

    if arguments.config is None:
        raise ConfigError(f"inspect {arguments.what} needs --config, an experiment file")
    inspection.show(
        _load(arguments),
        arguments.what,
        samples=arguments.samples,
        examine=arguments.examine,
        html=arguments.html,
    )


def _sweep(arguments: argparse.Namespace) -> None:
    from vl_jax import sweep

    print(sweep.run(arguments.config, arguments.sweep.split(","), arguments.workdir, arguments.overrides))


def _evaluate(arguments: argparse.Namespace) -> None:
    from vl_jax import experiment

    if (arguments.model is None) != (arguments.config is None):
        raise ConfigError("--model and --config go together: the experiment file says what --model is asked")
    if arguments.model is None:
        results = experiment.evaluate_run(arguments.workdir, arguments.task, arguments.overrides)
    else:
        overrides = (*arguments.overrides, ("init", str(arguments.model)))
        chosen = load(arguments.config, overrides)
        results = experiment.evaluate_published(chosen, arguments.task, arguments.workdir)
    print(json.dumps(results, indent=2, ensure_ascii=False))


def _report(arguments: argparse.Namespace) -> None:
    from vl_jax import comparison, report

    collection = comparison.is_collection(arguments.workdir)
    write = comparison.write_comparison if collection else report.write_report
    print(write(arguments.workdir))


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.draw is not None and arguments.image is None:
        raise ConfigError("--draw needs --image, on which it draws")
    if arguments.model is not None and arguments.audio is not None:
        raise ConfigError("--audio is for --workdir: a run says how its model hears")
    if arguments.model is not None:
        text = _stream(arguments)
    else:
        from vl_jax import experiment

        text = experiment.answer(
            arguments.workdir,
            prompt=arguments.prompt,
            image=arguments.image,
            audio=arguments.audio,
            max_new_tokens=arguments.max_new_tokens,
        )
        print(text)
    if arguments.draw is not None:
        _draw(text, arguments.image, arguments.draw)


def _draw(text: str, image: Path, target: Path) -> None:
    """Writes the image with the boxes of an answer, and says how many there are."""
    from vl_jax.data import grounding
    from vl_jax.data.sample import FileImage

    found, picture = grounding.parse(text), FileImage(image, where="--image")()
    boxes = found.boxes(*picture.size)
    drawing = grounding.draw(picture, boxes)
    drawing.picture.save(target)
    print(f"{target}: boxes drawn: {len(boxes)}, not readable: {found.malformed}", file=sys.stderr)
    for number, label in drawing.legend.items():
        print(f"{target}: {number} stands for {label!r}, which no font here can write", file=sys.stderr)


def _stream(arguments: argparse.Namespace) -> str:
    """Prints the answer of a published checkpoint as it grows, and returns it."""
    from vl_jax import from_pretrained

    mark = "<image>\n" if arguments.image else ""
    message = {"role": "user", "content": mark + arguments.prompt}
    images = [arguments.image] if arguments.image else []
    model = from_pretrained(arguments.model)
    pieces = []
    for piece in model.stream([message], images, max_new_tokens=arguments.max_new_tokens):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


def _convert(arguments: argparse.Namespace) -> None:
    if (arguments.source / "metrics.jsonl").is_file():  # a run, whose model came from a published one
        from vl_jax.experiment import export

        export(arguments.source, arguments.target)
    else:
        from vl_jax.interop.convert import convert

        convert(arguments.source, arguments.target)
    print(arguments.target)


def _conformance(arguments: argparse.Namespace) -> None:
    from vl_jax import process
    from vl_jax.moe import conformance

    process.simulate_devices(8)  # to spread experts over, on a machine without an accelerator
    results = conformance.check(arguments.scheme)
    for result in results:
        print(result)
    failed = sum(result.passed is False for result in results)
    if failed:
        raise ConfigError(f"{arguments.scheme}: {failed} of {len(results)} properties failed")


def _benchmark(arguments: argparse.Namespace) -> None:
    of_data = arguments.name in ("loader", "packing")
    if not of_data and (arguments.config or arguments.overrides):
        raise ConfigError(f"benchmark {arguments.name} takes no --config: what it times is fixed")
    if arguments.name == "routing":
        if arguments.topology:
            from vl_jax import routing_aot

            routing_aot.run(arguments.topology, json_file=arguments.json)
            return
        from vl_jax import routing_benchmark

        routing_benchmark.run(repeats=arguments.repeats, json_file=arguments.json)
        return
    if arguments.topology:
        raise ConfigError("--topology is for 'benchmark routing' alone")
    if of_data:
        from vl_jax import loader_benchmark, packing_benchmark

        if arguments.config is None:
            raise ConfigError(f"benchmark {arguments.name} needs --config, an experiment file")
        run = (loader_benchmark if arguments.name == "loader" else packing_benchmark).run
        run(_load(arguments), repeats=arguments.repeats, json_file=arguments.json)
        return
    from vl_jax import benchmark

    benchmark.run(arguments.name, repeats=arguments.repeats, json_file=arguments.json)


def _convert_data(arguments: argparse.Namespace) -> None:
    from vl_jax import conversion

    conversion.run(_load(arguments), arguments.source, arguments.target)


def _tokenizer(arguments: argparse.Namespace) -> None:
    from vl_jax.data.tokenizer import train_tokenizer

    train_tokenizer(arguments.input, vocab_size=arguments.vocab_size, out=arguments.out)
    print(arguments.out)
