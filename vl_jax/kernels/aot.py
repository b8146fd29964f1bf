"""Compiling for a TPU that is not there: what a program costs, and whether its kernels compile.

    measure("v5e", lambda target: function, *shapes) -> Cost(flops, bytes, temporaries, ...)

Needs ``libtpu`` (``pip install libtpu``), on a CPU only process. Flops and bytes are the compiler's count; it
knows of a Pallas kernel what the kernel's cost estimate says, and counts the body of a loop once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from vl_jax.kernels.target import Target, target_of

# The smallest topology of every generation.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x4",
    "v5p": "v5p:2x2x2",
    "v6e": "v6e:2x4",
    "tpu7x": "tpu7x:2x2x1",
}
# libtpu looks for the machine it is on, and for other processes that use it, unless told not to.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device does in one call of a compiled program."""

    flops: float
    bytes: float  # read and written in device memory
    temporaries: int  # bytes allocated besides arguments and results
    seconds: float  # that compiling took


def devices(topology: str, *, slices: int = 1) -> list[Any]:
    """The devices of a generation in ``TOPOLOGIES``, or of a topology name such as ``v5e:4x4``.

    Args:
      slices: how many of that topology, joined by the network of the data centre.

    Raises:
      RuntimeError: there is no libtpu.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    name = TOPOLOGIES.get(topology, topology)
    several = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices)


def measure(
    topology: str, build: Callable[[Target], Callable[..., Any]], *arguments: Any, **options: Any
) -> Cost:
    """Compiles ``build(target)`` for one device of a topology.

    Args:
      build: gives the function for the target it is compiled for.
      arguments: trees of ``jax.ShapeDtypeStruct``.
      options: of ``jax.jit``.
    """
    device = devices(topology)[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), list(arguments)
    )
    start = time.perf_counter()
    lowered = jax.jit(build(target_of(device.device_kind)), **options).lower(*placed)
    compiled = compile_absent(lowered)
    seconds = time.perf_counter() - start
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Cost(
        flops=cost.get("flops", 0.0),
        bytes=cost.get("bytes accessed", 0.0),
        temporaries=0 if memory is None else memory.temp_size_in_bytes,
        seconds=seconds,
    )


# XLA's EFFORT_O1: a program is cut over devices all the same, but what is left becomes slower code.
_QUICK: Any = {"optimization_level": 19}  # jax declares texts alone, and takes numbers


def compile_absent(lowered: jax.stages.Lowered, *, quick: bool = False) -> jax.stages.Compiled:
    """Compiles a program for devices that are not there.

    Args:
      quick: with less effort for the speed of the code, in less than half the time.
    """
    with warnings.catch_warnings():
        # It enters the persistent cache, but cannot leave it: jax compiles again.
        warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
        return lowered.compile(_QUICK if quick else None)


def text_of(compiled: jax.stages.Compiled) -> str | None:
    """The program; None where jax cannot show it: jax 0.10, with asynchronous parts."""
    with _unheard():  # Where it fails, the compiler prints its whole stack first.
        try:
            return compiled.as_text()
        except jax.errors.JaxRuntimeError:
            return None


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """While it lasts, nothing is written to the standard error of the process, by native code neither."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
