"""Training of mixture-of-experts vision-language models in JAX, from one CPU to a TPU pod."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vl_jax.api.calls import evaluate, load_experiment, load_run, train
    from vl_jax.api.heads import add_head, export_head, read_head, remove_head
    from vl_jax.api.listen import listen
    from vl_jax.api.predict import predict
    from vl_jax.api.run import Run
    from vl_jax.fusion.gate import CrossModalGate
    from vl_jax.interop.pretrained import from_pretrained
    from vl_jax.model import VisionLanguage
    from vl_jax.moe.layer import DynamicMoE
    from vl_jax.runtime.errors import UserError

__version__ = "0.1.0"

# What users import from here, loaded when it is first asked for: ``import vl_jax`` alone is instant.
_PUBLIC = {
    "CrossModalGate": "vl_jax.fusion.gate",
    "DynamicMoE": "vl_jax.moe.layer",
    "Run": "vl_jax.api.run",
    "UserError": "vl_jax.runtime.errors",
    "VisionLanguage": "vl_jax.model",
    "add_head": "vl_jax.api.heads",
    "export_head": "vl_jax.api.heads",
    "from_pretrained": "vl_jax.interop.pretrained",
    "listen": "vl_jax.api.listen",
    "load_experiment": "vl_jax.api.calls",
    "load_run": "vl_jax.api.calls",
    "predict": "vl_jax.api.predict",
    "read_head": "vl_jax.api.heads",
    "remove_head": "vl_jax.api.heads",
}
_ROOMS = ("evaluate", "train")  # folders that can be called, see runtime/callable_module.py
__all__ = [
    "CrossModalGate",
    "DynamicMoE",
    "Run",
    "UserError",
    "VisionLanguage",
    "add_head",
    "evaluate",
    "export_head",
    "from_pretrained",
    "listen",
    "load_experiment",
    "load_run",
    "predict",
    "read_head",
    "remove_head",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
