"""The parsers of the commands: what the command line reads, and what a shell can complete."""

from __future__ import annotations

import argparse
import importlib
from typing import NoReturn

from vl_jax.commands.table import COMMANDS


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with status 2."""
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def command_parser(name: str) -> OneLineParser:
    """The parser of what comes after the name of a command, whose file says which options there are."""
    command = COMMANDS[name]
    parser = OneLineParser(
        prog=f"vl_jax {name}",
        description=command.purpose,
        epilog=f"example: python -m vl_jax {command.example}",
        allow_abbrev=False,
    )
    module = importlib.import_module(f"vl_jax.commands.{name.replace('-', '_')}")
    module.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    parser.set_defaults(run=module.run)
    return parser


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser, by each of their names."""
    return {name: action for action in parser._actions for name in action.option_strings}


def words_of(parser: argparse.ArgumentParser) -> list[str]:
    """What the words without a name may be, where there is a choice."""
    free = [action for action in parser._actions if not action.option_strings]
    return [str(choice) for action in free for choice in action.choices or ()]
