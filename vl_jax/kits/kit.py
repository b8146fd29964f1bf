"""The kit that an adapter is for; it is imported where it is used, and is part of no extra."""

from __future__ import annotations

import importlib
from typing import Any

from vl_jax.runtime.errors import UserError


def part_of(kit: str, module: str) -> Any:
    """A module of an installed kit.

    Args:
      kit: as people call it, for the message.

    Raises:
      UserError: the kit is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(
            f"{kit} is not installed here (no package {package}): install it in an environment of its own, "
            "beside vl_jax, as docs/kits.md says"
        ) from None
