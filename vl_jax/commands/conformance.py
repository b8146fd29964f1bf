"""``conformance``: the properties that a routing scheme of one's own must have."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vl_jax.schema import ConfigError

if TYPE_CHECKING:
    from vl_jax.moe.routing import MoEConfig

_LAYER = "model.moe."  # what overrides name where there is no experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "scheme", metavar="FILE:NAME", nargs="?", default="", help="or the name of a built-in scheme"
    )
    parser.add_argument(
        "--config", default="", help="experiment whose sparse layers are checked, with widths of 4"
    )
    parser.add_argument(
        "--ideal", action="store_true", help="say how near it comes to the best router, where that is known"
    )
    parser.add_argument("--json", type=Path, help="with --ideal: file for the figures")


def run(arguments: argparse.Namespace) -> None:
    """Prints every property with its result, or how near the scheme comes to the best router.

    Raises:
      ConfigError: a property does not hold, or there is no such scheme.
    """
    if not arguments.scheme and not arguments.config:
        raise ConfigError("conformance needs a scheme, FILE:NAME, or --config, or both")
    if arguments.ideal:
        if arguments.config or arguments.overrides or not arguments.scheme:
            raise ConfigError("--ideal tries a scheme on a problem of its own: it takes no --config")
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
    failed, total = 0, 0
    for stack, layer in _layers(arguments.scheme, arguments.config, arguments.overrides).items():
        if stack:
            print(f"{stack}: scheme={layer.scheme}, num_experts={layer.num_experts}, top_k={layer.top_k}")
        results = conformance.check(layer.scheme, layer)
        for result in results:
            print(result)
        failed += sum(result.passed is False for result in results)
        total += len(results)
    if failed:
        raise ConfigError(f"{arguments.scheme or arguments.config}: {failed} of {total} properties failed")


def _layers(scheme: str, spec: str, overrides: Sequence[tuple[str, str]]) -> dict[str, MoEConfig]:
    """The layers to be checked, by stack of the experiment; without one, a small layer.

    Raises:
      ConfigError: the experiment cannot be read or has no sparse layers, or an override is not of the layer.
    """
    from vl_jax import config as config_lib
    from vl_jax.moe.conformance import small_config

    if not spec:
        other = [path for path, _ in overrides if not path.startswith(_LAYER)]
        if other:
            raise ConfigError(f"config.{other[0]}: without --config there is no more than config.{_LAYER}...")
        try:
            small = small_config(scheme)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return {"": config_lib.replace(small, [(p.removeprefix(_LAYER), text) for p, text in overrides])}
    stacks = config_lib.load(spec, overrides).model.stacks
    if not stacks:
        raise ConfigError(f"--config={spec}: the model has no sparse layers")
    changes = {"expert_dim": 4, **({"scheme": scheme} if scheme else {})}
    try:
        return {name: dataclasses.replace(stack.moe, **changes) for name, stack in stacks.items()}
    except ValueError as error:
        raise ConfigError(f"--config={spec}: {error}") from None
