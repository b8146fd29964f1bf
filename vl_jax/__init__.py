"""Training of mixture-of-experts vision-language models in JAX, from one CPU to a TPU pod."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees of ``_PUBLIC``
    from vl_jax.fusion.gate import CrossModalGate
    from vl_jax.interop.pretrained import from_pretrained
    from vl_jax.model import VisionLanguage
    from vl_jax.moe.layer import DynamicMoE

__version__ = "0.1.0"

# What users import from here, loaded when it is first asked for: ``import vl_jax`` alone is instant.
_PUBLIC = {
    "CrossModalGate": "vl_jax.fusion.gate",
    "DynamicMoE": "vl_jax.moe.layer",
    "VisionLanguage": "vl_jax.model",
    "from_pretrained": "vl_jax.interop.pretrained",
}
__all__ = ["CrossModalGate", "DynamicMoE", "VisionLanguage", "from_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
