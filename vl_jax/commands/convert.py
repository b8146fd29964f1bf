"""``convert``: a published folder to a checkpoint, or back, or a fine-tuned run, or a head of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--from", dest="source", required=True, type=Path, help="what to convert")
    parser.add_argument("--to", dest="target", required=True, type=Path, help="must not exist")
    parser.add_argument("--average", action="store_true", help="of a run, the average that it keeps")
    parser.add_argument("--head", default="", help="of a run, this head alone, which other models can take")


def run(arguments: argparse.Namespace) -> None:
    """Converts, and prints the folder that was made."""
    from vl_jax.report.run import is_run

    if arguments.average and (arguments.head or not is_run(arguments.source)):
        raise ConfigError("--average is for a whole run: --from names its folder, without --head")
    if arguments.head:
        from vl_jax.api.heads import export_head

        export_head(arguments.source, arguments.head, arguments.target)
    elif is_run(arguments.source):  # which began with a published one
        from vl_jax.runs import export

        export(arguments.source, arguments.target, averaged=arguments.average)
    else:
        from vl_jax.interop.convert import convert

        convert(arguments.source, arguments.target)
    print(arguments.target)
