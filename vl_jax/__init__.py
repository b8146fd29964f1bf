"""Training of mixture-of-experts vision-language models in JAX, from one CPU to a TPU pod."""

from __future__ import annotations

__version__ = "0.1.0"
