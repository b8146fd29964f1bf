"""``predict``: what each head of a run says of a picture, a sound or a text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vl_jax.report.drawing import draw_boxes
from vl_jax.schema import ConfigError

_SHOWN = 10  # classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a run")
    parser.add_argument("--image", type=Path, help="file of a picture")
    parser.add_argument("--audio", type=Path, help="file of a sound, with a run that was trained on some")
    parser.add_argument("--text", default="", help="the question, or the text that the model reads")
    parser.add_argument("--head", action="append", default=[], help="name of a head; all")
    parser.add_argument("--task", default="", help="what to do, by the name of a task; only its head is read")
    parser.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="texts to compare a picture with, a line each; held-out",
    )
    parser.add_argument("--draw", type=Path, metavar="PNG", help="where the image goes, and what is said")
    parser.add_argument("--save", type=Path, metavar="FILE", help="where what a head makes goes")
    parser.add_argument("--seed", type=int, help="of what is made out of noise; that of the head's config")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--json", action="store_true", help="print JSON, all classes included")


def run(arguments: argparse.Namespace) -> None:
    """Prints what every head says, under its name, and draws it where that is asked for.

    Raises:
      ConfigError: options that do not go together.
      UserError: nothing that is said can be drawn.
    """
    from vl_jax.api.calls import load_run
    from vl_jax.api.predict import ANSWER, draw, made, predict
    from vl_jax.generation.decode import Writer

    if arguments.draw is not None and arguments.image is None:
        raise ConfigError("--draw needs --image, on which it draws")
    opened = load_run(arguments.workdir, heads=arguments.head, task=arguments.task)
    lines = arguments.candidates.read_text(encoding="utf-8").splitlines() if arguments.candidates else []
    found = predict(
        opened,
        image=arguments.image,
        audio=arguments.audio,
        text=arguments.text,
        heads=arguments.head,
        candidates=[line.strip() for line in lines if line.strip()],
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        task=arguments.task,
    )
    if arguments.save is not None:
        arguments.save.write_bytes(made(opened, found))
    if arguments.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        for head, said in found.items():
            print("\n".join([head, *(f"  {line}" for line in said_lines(said))]))
    if arguments.draw is not None:
        if isinstance(opened.layout.model, Writer):
            orientation = opened.experiment.data.tiling.orientation
            draw_boxes(found[ANSWER], arguments.image, arguments.draw, orientation)
        else:
            draw(opened, found, arguments.image).save(arguments.draw)


def said_lines(said: Any) -> list[str]:
    """What a head says, for people to read; the files that it made are left out."""
    if isinstance(said, dict):
        said = {name: value for name, value in said.items() if not str(value).startswith("data:")}
    if isinstance(said, dict) and said and all(isinstance(value, float) for value in said.values()):
        likely = sorted(said.items(), key=lambda item: -item[1])
        lines = [f"{share:6.1%}  {name}" for name, share in likely[:_SHOWN]]
        return lines + ([f"and {len(said) - _SHOWN} classes more"] if len(said) > _SHOWN else [])
    if isinstance(said, list) and all(isinstance(entry, dict) and "similarity" in entry for entry in said):
        return [
            f"{e['similarity']:7.4f}  {e['text']}" + (f"  ({e['id']})" if "id" in e else "") for e in said
        ]
    return (said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)).splitlines() or [""]
