"""Training: stages, objectives, the step, the loop. ``vl_jax.train(...)`` trains: see api/calls.py."""

from __future__ import annotations

import sys

from vl_jax.runtime.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
