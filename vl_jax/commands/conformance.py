"""``conformance``: the properties that a routing scheme of one's own must have."""

from __future__ import annotations

import argparse

from vl_jax.schema import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("scheme", metavar="FILE:NAME", help="or the name of a built-in scheme")


def run(arguments: argparse.Namespace) -> None:
    """Prints every property with its result.

    Raises:
      ConfigError: a property does not hold.
    """
    from vl_jax.moe import conformance
    from vl_jax.runtime import start

    start.simulate_devices(8)  # to spread experts over, on a machine without an accelerator
    results = conformance.check(arguments.scheme)
    for result in results:
        print(result)
    failed = sum(result.passed is False for result in results)
    if failed:
        raise ConfigError(f"{arguments.scheme}: {failed} of {len(results)} properties failed")
