"""The command line: ``python -m vl_jax COMMAND``. A user's mistake ends in one line, not in a traceback."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Sequence

import vl_jax
from vl_jax import parts
from vl_jax.commands.parsing import OneLineParser, command_parser, options_of, told_of_hosts
from vl_jax.commands.table import COMMANDS
from vl_jax.runtime import errors
from vl_jax.runtime.storage import arguments as storage_arguments

EXAMPLE = "python -m vl_jax train --config=quickstart --workdir=runs/quickstart"
# How errors of the runtime begin; jax raises some of them as ValueError.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_NUMBER = re.compile(r"-\.?\d")  # what begins so is a value, not an option


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a user's mistake, 1 for a fault of the package.

    Of several processes that compute together, one that fails tells the others.
    """
    began = time.time()
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        _parser().print_help()
        return 0
    arguments = _parse(given)
    arguments.began = began
    try:
        status = _light(arguments) if COMMANDS[arguments.command].light else _compute(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _tell_hosts("interrupted", 130)
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        if arguments.traceback:
            raise
        return _failed(error)


def _light(arguments: argparse.Namespace) -> int:
    """Runs a command that computes nothing: jax is not even imported."""
    with storage_arguments.brought(arguments):
        arguments.run(arguments)
    return 0


def _compute(arguments: argparse.Namespace) -> int:
    """Runs a command with devices and caches set up."""
    import jax

    from vl_jax.runtime import start
    from vl_jax.runtime.hosts.joined import joined
    from vl_jax.train.loop import Stopped

    start.set_up(told_of_hosts(arguments), joins=COMMANDS[arguments.command].joins)
    status, hosts = 0, joined()
    try:
        with storage_arguments.brought(arguments, lambda: jax.process_index() == 0):
            arguments.run(arguments)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        status = 128 + stopped.number
    if hosts is not None:
        hosts.part()
    return status


def _failed(error: Exception) -> int:
    """Says what went wrong, to the other hosts too; returns the exit status."""
    from vl_jax.runtime.hosts import log
    from vl_jax.runtime.hosts.joined import joined
    from vl_jax.runtime.hosts.pulse import LOST
    from vl_jax.runtime.hosts.rendezvous import Missing

    text, hosts = errors.one_line(error), joined()
    if hosts is not None:
        log.write("".join(traceback.format_exception(error)))
        if text is None or _is_of_devices(error):  # It may be how the end of another process looks from here.
            hosts.lost()
    line = _unforeseen(error) if text is None else text
    status = LOST if isinstance(error, Missing) else 1 if text is None else 2
    log.say(f"error: {line}")
    _tell_hosts(line, status)
    return status


def _is_of_devices(error: BaseException | None) -> bool:
    """Whether it began with an error of the runtime, such as a collective that nobody answers."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tell_hosts(line: str, status: int) -> None:
    """Tells the other hosts, if there are any, why this one ends."""
    if _has_hosts():
        from vl_jax.runtime.hosts.joined import joined

        if (hosts := joined()) is not None:
            hosts.fail(line, status)


def _unforeseen(error: Exception) -> str:
    """One line about a fault of the package, whose traceback goes to a file."""
    lines = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", prefix="vl_jax_", suffix=".txt", delete=False) as file:
        file.write(lines)
    return f"{errors.described(error)}; this is a fault of vl_jax, please report it with {file.name}"


def _parser() -> OneLineParser:
    """The parser of the first word, with a list of all commands."""
    parser = OneLineParser(
        prog="vl_jax",
        description=vl_jax.__doc__,
        epilog=f"example: {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="vl_jax COMMAND [options]",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.purpose)
    return parser


def _version() -> str:
    jax = importlib.metadata.version("jax")
    return f"vl_jax {vl_jax.__version__} (jax {jax}, Python {platform.python_version()})"


def run() -> None:
    """Runs the command of this process, and ends it, even if a thread that reads data is stuck."""
    from vl_jax.data.stream.background import DATA_THREAD

    status = main()
    if _has_hosts():  # what is left of jax would wait for the others
        from vl_jax.runtime.hosts.joined import end_at_once

        end_at_once(status)
    if any(thread.name.startswith(DATA_THREAD) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _has_hosts() -> bool:
    """Whether this process has joined others."""
    module = sys.modules.get("vl_jax.runtime.hosts.joined")
    return module is not None and module.joined() is not None


def _parse(argv: list[str]) -> argparse.Namespace:
    name, *rest = argv
    if name not in COMMANDS:
        parser = _parser()
        if not name.startswith("-"):
            parser.error(f"invalid choice: {name!r} is no command; {parts.near(name, COMMANDS)}")
        if name not in ("-h", "--help", "--version"):
            parser.error(f"the command comes first, before {name}: {', '.join(COMMANDS)}")
        parser.parse_args(argv)  # which exits
    parser = command_parser(name)
    _check_options(parser, rest)
    arguments, others = parser.parse_known_args(rest)
    arguments.command = name
    arguments.overrides = _overrides(parser, others)
    refused = COMMANDS[name].no_overrides
    if refused and arguments.overrides:
        path, _ = arguments.overrides[0]
        parser.error(f"{name} takes no overrides such as --config.{path}: {refused}")
    return arguments


def _check_options(parser: argparse.ArgumentParser, words: Iterable[str]) -> None:
    """Refuses an option that the command does not have, before any that is missing is asked for."""
    known = options_of(parser)
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        is_option = word.startswith("-") and word != "-" and not _NUMBER.match(word)
        if is_option and name not in known and not word.startswith("--config."):
            parser.error(f"unknown argument {name!r}; {_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    """What a word that is no option was perhaps meant to be."""
    first, dot, path = name.lstrip("-").partition(".")
    if dot:  # an override, by whatever name
        return (
            f"overrides look like --config.model.moe.top_k=4; did you mean '--config.{_tail(first, path)}'?"
        )
    found = parts.near(f"--{first}", [option for option in known if option.startswith("--")])
    return f"{found}; overrides look like --config.model.moe.top_k=4"


def _tail(first: str, path: str) -> str:
    """``confg.seed`` means ``config.seed``, and ``model.dtype`` means ``config.model.dtype``."""
    return path if parts.near(first, ["config"]).startswith("did you mean") else f"{first}.{path}"


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
