"""``generate``: an answer to a prompt about an image, by a run or a published checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vl_jax.report.drawing import draw_boxes
from vl_jax.schema import ConfigError

if TYPE_CHECKING:
    from vl_jax.ask import Asked
else:
    Asked = Any  # a command says what it can do without loading what does it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", type=Path, help="folder of a run")
    where.add_argument("--model", type=Path, help="folder of a published checkpoint")
    parser.add_argument("--image", type=Path, help="without one, the prompt stands alone")
    parser.add_argument("--audio", type=Path, help="a sound, with a run that was trained on some")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--draw", type=Path, metavar="PNG", help="where the image goes, with the boxes named")
    parser.add_argument("--max-new-tokens", type=int, default=32)


def run(arguments: argparse.Namespace) -> None:
    """Prints the answer, and draws its boxes where that is asked for.

    Raises:
      ConfigError: options that do not go together.
    """
    if arguments.draw is not None and arguments.image is None:
        raise ConfigError("--draw needs --image, on which it draws")
    if arguments.model is not None and arguments.audio is not None:
        raise ConfigError("--audio is for --workdir: a run says how its model hears")
    model = _open(arguments)
    text = _stream(model, arguments)
    if arguments.draw is not None:
        draw_boxes(text, arguments.image, arguments.draw, model.orientation)


def _open(arguments: argparse.Namespace) -> Asked:
    from vl_jax import ask

    return ask.of_run(arguments.workdir) if arguments.workdir else ask.of_published(arguments.model)


def _stream(model: Asked, arguments: argparse.Namespace) -> str:
    """Prints the answer as it grows, and returns it."""
    pieces = []
    for piece in model.stream(
        arguments.prompt,
        image=arguments.image,
        audio=arguments.audio,
        max_new_tokens=arguments.max_new_tokens,
    ):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)
