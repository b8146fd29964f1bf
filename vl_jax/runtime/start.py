"""What a process sets up once, before it computes: logging, processes of a pod, simulated devices, caches."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
from collections.abc import Mapping

import jax

import vl_jax
from vl_jax.runtime.cache_folder import cache_folder
from vl_jax.runtime.hosts import cluster
from vl_jax.runtime.hosts.joined import join, joined
from vl_jax.runtime.version import digest

# Whether processes join: 1 always, 0 never; unset: where the environment says that there are several.
DISTRIBUTED = "VL_JAX_DISTRIBUTED"
JOIN_WITHIN = "VL_JAX_JOIN_WITHIN"  # seconds that processes wait for each other
_PATIENCE = 600.0
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


def set_up(told: Mapping[str, str] | None = None, *, joins: bool = False) -> None:
    """Logging, threads, other processes of a job, and a compilation cache: the next start takes seconds.

    A second call changes nothing.

    Args:
      told: variables of the environment that a user has given otherwise; see ``hosts.cluster``.
      joins: whether this process joins the others where the environment says that there are any.

    Raises:
      ValueError: other processes have not come, run another version, or the environment is not whole.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vl_jax").setLevel(logging.INFO)
    give_threads()
    _find_others({**os.environ, **(told or {})}, joins=joins)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def versions() -> dict[str, str]:
    """What has to be the same on all hosts."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"vl_jax": f"{vl_jax.__version__} (files {digest()})", **found}


def _find_others(said: Mapping[str, str], *, joins: bool) -> None:
    wanted = said.get(DISTRIBUTED) or ("" if joins or said.get(cluster.ADDRESS) else "0")
    if wanted == "0" or joined() is not None or jax.distributed.is_initialized():
        return
    found = cluster.find(said, cluster.tpu_metadata())
    if found is None or found.count == 1:
        if found is None and wanted:
            raise ValueError(
                f"{DISTRIBUTED}={wanted}: nothing here says which processes there are; on other clusters set "
                f"{cluster.ADDRESS}, {cluster.COUNT} and {cluster.NUMBER}"
            )
        return
    text = said.get(JOIN_WITHIN) or f"{_PATIENCE:g}"
    try:
        within = float(text)
    except ValueError:
        raise ValueError(f"{JOIN_WITHIN}={text}: must be seconds") from None
    hosts = join(found, versions(), within=within)
    logging.getLogger(__name__).info(
        "%s of %d has joined (%s)", hosts.names[hosts.number], hosts.count, found.source
    )
