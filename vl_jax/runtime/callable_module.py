"""A room of the package that can be called: ``vl_jax.train(...)`` and ``vl_jax.train.loop`` are both there.

A package's attribute of the name ``train`` is its folder ``train`` as soon as anything in it is imported. So
the folder's module itself passes a call on to the function of its name in ``api/calls.py``.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called as the function of its name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See ``vl_jax.api.calls``."""
        calls = importlib.import_module("vl_jax.api.calls")
        return getattr(calls, self.__name__.rpartition(".")[2])(*args, **kwargs)
