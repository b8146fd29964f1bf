"""What a process sets up once, before it computes: logging, processes of a pod, simulated devices, caches."""

from __future__ import annotations

import logging
import os
import re

import jax

from vl_jax.runtime.cache_folder import cache_folder

_DEVICE_COUNT = "--xla_force_host_platform_device_count"
# A device waits in one thread for every loop that it is in, and in one more; no loops nest deeper than four.
_THREADS_PER_DEVICE = 8


def simulate_devices(count: int) -> None:
    """Before jax starts: this machine's CPU passes for so many devices, unless the user has said how many."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _DEVICE_COUNT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_DEVICE_COUNT}={count}".strip()
    give_threads()


def give_threads() -> None:
    """Before jax starts: threads enough for simulated devices that wait for one another.

    XLA's CPU client has a thread for each device (or core), and a collective operation keeps its thread until
    the last device has come. A loop that waits for a computation lets what stands behind it begin, so that
    one device may hold several threads, and the one that all others wait for finds none left: on two cores a
    training step over eight devices stood still once in some hundred times (jaxlib 0.10.2). XLA takes the
    number of threads from ``NPROC``, which is left alone where the user has set it.
    """
    devices = re.search(rf"{_DEVICE_COUNT}=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if devices:
        threads = max(_THREADS_PER_DEVICE * int(devices[1]), os.cpu_count() or 1)
        os.environ.setdefault("NPROC", str(threads))


def set_up() -> None:
    """Logging, threads, other processes of a pod, and a compilation cache: the next start takes seconds.

    A second call changes nothing.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vl_jax").setLevel(logging.INFO)
    give_threads()
    if (
        os.environ.get("VL_JAX_DISTRIBUTED") and not jax.distributed.is_initialized()
    ):  # set by the launchers in tpu_scripts
        jax.distributed.initialize()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
