"""``completion``: a script by which bash or zsh completes commands and options, made from the parsers."""

from __future__ import annotations

import argparse
import shlex

from vl_jax.commands.parsing import command_parser, options_of, words_of
from vl_jax.commands.table import COMMANDS

_BASH = """\
# Completion of vl_jax for bash: eval "$(vl_jax completion bash)"
_vl_jax() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  COMPREPLY=()
  if [[ "$word" == = || "${{COMP_WORDS[COMP_CWORD-1]}}" == = ]]; then
    return  # the value of an option: a file
  fi
  if ((COMP_CWORD == 1)); then
    words={commands}
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ "${{COMPREPLY[0]:-}}" != *= ]] || compopt -o nospace 2>/dev/null || true
}}
complete -o default -F _vl_jax vl_jax
"""

_ZSH = """\
#compdef vl_jax
# Completion of vl_jax for zsh: source <(vl_jax completion zsh)
_vl_jax() {{
  local -a commands
  commands=(
{commands}
  )
  if ((CURRENT == 2)); then
    _describe command commands
    return
  fi
  local command="${{words[2]}}"
  shift words
  ((CURRENT--))
  case "$command" in
{cases}
  esac
}}
if [[ "${{funcstack[1]:-}}" == _vl_jax ]]; then
  _vl_jax "$@"
else
  compdef _vl_jax vl_jax
fi
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("shell", choices=("bash", "zsh"))


def run(arguments: argparse.Namespace) -> None:
    """Prints the script."""
    print(script(arguments.shell), end="")


def script(shell: str) -> str:
    """The script for ``bash`` or ``zsh``."""
    parsers = {name: command_parser(name) for name in COMMANDS}
    if shell == "bash":
        cases = [f"      {name}) words={shlex.quote(_words(parser))} ;;" for name, parser in parsers.items()]
        return _BASH.format(commands=shlex.quote(" ".join(COMMANDS)), cases="\n".join(cases))
    commands = [f"    {shlex.quote(f'{name}:{command.purpose}')}" for name, command in COMMANDS.items()]
    cases = [f"    {name}) _arguments {_specs(parser)} ;;" for name, parser in parsers.items()]
    return _ZSH.format(commands="\n".join(commands), cases="\n".join(cases))


def _words(parser: argparse.ArgumentParser) -> str:
    """Options, with ``=`` where a value follows, and free words."""
    options = [
        name if action.nargs == 0 else f"{name}="
        for name, action in options_of(parser).items()
        if name.startswith("--")
    ]
    return " ".join([*words_of(parser), *options])


def _specs(parser: argparse.ArgumentParser) -> str:
    """Options and free words as ``_arguments`` of zsh has them."""
    specs = []
    for name, action in options_of(parser).items():
        if name.startswith("--"):
            text = (action.help or "").translate(str.maketrans("[]:", "()-"))
            value = "" if action.nargs == 0 else f"={'[' + text + ']'}:value:_files"
            specs.append(f"{name}{value}" if value else f"{name}[{text}]")
    choices = words_of(parser)
    specs.append(f"1:what:({' '.join(choices)})" if choices else "*:file:_files")
    return " ".join(map(shlex.quote, specs))
