"""Packages that only some metrics need; they come with ``pip install 'vl_jax[eval]'``."""

from __future__ import annotations

import importlib
from typing import Any

from vl_jax.runtime.errors import UserError


def needed(module: str, *, by: str) -> Any:
    """A module of the ``eval`` extra.

    Args:
      by: the metric that needs it, for the message.

    Raises:
      UserError: its package is not installed; one line that names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise UserError(f"{by} needs {package}, which is not installed: pip install 'vl_jax[eval]'") from None
