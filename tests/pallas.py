"""What the tests of kernels share: a small simulated TPU, the race detector, compiling for absent TPUs."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from vl_jax.kernels import aot
from vl_jax.kernels.target import Target

# Tiles of 16 rows and of 128 columns, so that small arrays have several.
SMALL = Target(vector_memory=200_000, row_tile=16, interpret=True)
# Room for whole matrices, so that rows are gathered inside the product.
LARGE = Target(row_tile=16, interpret=True)
# The same two with a TPU simulated: memory starts as NaN, and an unordered read and write is an error. Where
# tiles are small, two cores share the grid.
TWO_CORES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
SMALL_RACES = dataclasses.replace(SMALL, cores=2, interpret=TWO_CORES)
LARGE_RACES = dataclasses.replace(LARGE, interpret=pltpu.InterpretParams(detect_races=True))


def run_without_races(function: Callable[..., Any], *arguments: Any, capfd: Any) -> Any:
    """The result of a function that detects races; jax >= 0.11 raises at a race, earlier ones print it."""
    result = jax.block_until_ready(jax.jit(function)(*arguments))
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err
    return result


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """One process at a time compiles for TPUs, each with a gigabyte and all of a core; or skips."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU needs libtpu: pip install libtpu")
    with open(Path(tempfile.gettempdir()) / "vl_jax_libtpu.lock", "w") as lock:
        until = time.monotonic() + 3600  # as long as all the others may take
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < until, f"{lock.name} is held by another process"
                time.sleep(0.2)
        yield


def compile_for(topology: str, build: Callable[[Target], Callable[..., Any]], *arguments: Any) -> aot.Cost:
    """``aot.measure``, or skips the test."""
    with one_at_a_time():
        return aot.measure(topology, build, *arguments)


# jax >= 0.11 says so where it lowers the kernels for GPUs.
TRITON_WARNING = "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"


def tracing_for(gpu: str) -> AbstractContextManager[Any]:
    """What is traced inside is for this kind of GPU, which may be absent."""
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="cuda")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("device",), axis_types=axes, abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)
