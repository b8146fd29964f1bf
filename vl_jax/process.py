"""What a process sets up once, before it computes: logging, processes of a pod, compilation cache."""

from __future__ import annotations

import logging
import os

import jax

from vl_jax.cache_folder import cache_folder


def set_up() -> None:
    """Logging, the other processes of a pod, and a compilation cache: a second run starts in seconds."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vl_jax").setLevel(logging.INFO)
    if os.environ.get("VL_JAX_DISTRIBUTED"):  # set by the launchers in tpu_scripts
        jax.distributed.initialize()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
