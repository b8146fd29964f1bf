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
    if command.joins:
        add_hosts(parser)
    parser.add_argument("--traceback", action="store_true", help="show the full traceback of an error")
    parser.set_defaults(run=module.run)
    return parser


# By the options of a command that computes on several hosts, the variables that say the same.
HOSTS = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
    "join_within": "VL_JAX_JOIN_WITHIN",
}


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """The options that say which processes there are, for where nothing else does."""
    group = parser.add_argument_group("several hosts, where neither a TPU pod nor SLURM says it")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the first process")
    group.add_argument("--processes", metavar="N", help="how many there are")
    group.add_argument("--process", metavar="I", help="which one this is, from 0")
    group.add_argument("--join-within", metavar="SECONDS", help="how long they wait for each other (600)")


def told_of_hosts(arguments: argparse.Namespace) -> dict[str, str]:
    """What the options say, by variable."""
    given = {variable: getattr(arguments, name, None) for name, variable in HOSTS.items()}
    return {variable: value for variable, value in given.items() if value is not None}


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser, by each of their names."""
    return {name: action for action in parser._actions for name in action.option_strings}


def words_of(parser: argparse.ArgumentParser) -> list[str]:
    """What the words without a name may be, where there is a choice."""
    free = [action for action in parser._actions if not action.option_strings]
    return [str(choice) for action in free for choice in action.choices or ()]
