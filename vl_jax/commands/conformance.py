"""``conformance``: the properties that a routing scheme of one's own must have."""

from __future__ import annotations

import argparse
from pathlib import Path

from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("scheme", metavar="FILE:NAME", help="or the name of a built-in scheme")
    parser.add_argument(
        "--ideal", action="store_true", help="say how near it comes to the best router, where that is known"
    )
    parser.add_argument("--json", type=Path, help="with --ideal: file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Prints every property with its result, or how near the scheme comes to the best router.

    Raises:
      ConfigError: a property does not hold, or there is no such scheme.
    """
    if arguments.ideal:
        from vl_jax.benchmarks import ideal_router

        try:
            print(ideal_router.examine(arguments.scheme, json_file=arguments.json))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return
    if arguments.json is not None:
        raise ConfigError("--json is for --ideal")
    from vl_jax.moe import conformance
    from vl_jax.runtime import start

    start.simulate_devices(8)  # to spread experts over, on a machine without an accelerator
    results = conformance.check(arguments.scheme)
    for result in results:
        print(result)
    failed = sum(result.passed is False for result in results)
    if failed:
        raise ConfigError(f"{arguments.scheme}: {failed} of {len(results)} properties failed")
