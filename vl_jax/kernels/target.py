"""What a Pallas kernel is built for: how much memory it may use, and whether it is interpreted."""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental.pallas import tpu as pltpu

KIB, MIB = 2**10, 2**20
# Vector memory of one core, by ``device_kind``. Half of what some have: tiles that fill more of it take a
# minute to compile and are no faster by the cost model.
VECTOR_MEMORY = {
    "TPU v4": 16 * MIB,
    "TPU v5 lite": 64 * MIB,
    "TPU v5e": 64 * MIB,
    "TPU v5": 64 * MIB,
    "TPU v5p": 64 * MIB,
    "TPU v6 lite": 64 * MIB,
    "TPU v6e": 64 * MIB,
    "TPU7x": 64 * MIB,
}
# Cores that work on one program as one device; 1 where there is no entry.
CORES = {"TPU v4": 2, "TPU v5": 2, "TPU v5p": 2}
LANES = 128
# Shared memory that a program may have, by what occurs in ``device_kind``; less on other GPUs of this maker.
NVIDIA = "NVIDIA"
SHARED_MEMORY = {name: 227 * KIB for name in ("H100", "H200", "H800", "GH200", "B200", "GB200")}
SHARED_MEMORY["A100"] = 163 * KIB


@dataclasses.dataclass(frozen=True)
class Target:
    """A TPU core, or its interpreter.

    The default fits every generation: it is what a program gets that is compiled for an unknown TPU.
    """

    vector_memory: int = 16 * MIB  # bytes
    cores: int = 1  # that share a program (megacore)
    row_tile: int = 512  # rows that one step of a kernel works on, at most
    interpret: bool | pltpu.InterpretParams = False  # True: as plain JAX; InterpretParams: a simulated TPU

    def __post_init__(self):
        if self.vector_memory < 1 or self.row_tile < 8:
            raise ValueError(
                f"vector_memory={self.vector_memory} must be >= 1 and row_tile={self.row_tile} >= 8"
            )

    @property
    def tile_budget(self) -> int:
        """Bytes to plan tiles with; the rest is for what the compiler spills."""
        return self.vector_memory * 5 // 8

    @property
    def memory_limit(self) -> int:
        """Bytes the compiler may use."""
        return self.vector_memory - MIB // 2 if self.vector_memory > MIB else self.vector_memory


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """A GPU with tensor cores, or its interpreter; extents of tiles are powers of two, and at most these."""

    shared_memory: int = 99 * KIB  # bytes that a program may have
    rows: int = 128
    columns: int = 256
    depth: int = 64  # of the contracted dimension, in one step
    interpret: bool = False

    def __post_init__(self):
        for name in ("rows", "columns", "depth"):
            if (size := getattr(self, name)) < 16 or size & (size - 1):
                raise ValueError(f"{name}={size}: must be a power of two, at least 16")


def target_of(device_kind: str) -> Target:
    """The target for a ``jax.Device.device_kind``.

    Raises:
      ValueError: there are no kernels for it.
    """
    if device_kind == "cpu":
        return Target(interpret=True)
    if device_kind not in VECTOR_MEMORY:
        raise ValueError(
            f"kernel='pallas' has no kernels for {device_kind!r}; only for {sorted(VECTOR_MEMORY)}"
        )
    return Target(vector_memory=VECTOR_MEMORY[device_kind], cores=CORES.get(device_kind, 1))


def gpu_target_of(device_kind: str) -> GpuTarget:
    """The target for a ``jax.Device.device_kind``.

    Raises:
      ValueError: there are no kernels for it.
    """
    if device_kind == "cpu":
        return GpuTarget(interpret=True)
    if not device_kind.startswith(NVIDIA):
        raise ValueError(f"kernel='triton' has no kernels for {device_kind!r}; only for {NVIDIA} GPUs")
    known = (size for name, size in SHARED_MEMORY.items() if name in device_kind)
    return GpuTarget(next(known, GpuTarget.shared_memory))


def choose(kernel: str, *widths: int) -> str:
    """What ``auto`` stands for where the program will run.

    ``pallas`` on a TPU that has it, ``triton`` on a GPU of NVIDIA's, else ``blocked``.

    Args:
      kernel: any other name stands for itself.
      widths: of the matrices; kernels for TPUs need multiples of 128.
    """
    if kernel != "auto":
        return kernel
    kind = current_kind()
    if kind in VECTOR_MEMORY and not any(width % LANES for width in widths):
        return "pallas"
    return "triton" if kind.startswith(NVIDIA) else "blocked"


def current_target() -> Target:
    """The target of ``pallas`` for the current mesh, else for the default backend: interpreted on a CPU."""
    return target_of(current_kind())


def current_gpu() -> GpuTarget:
    """The same of ``triton``."""
    return gpu_target_of(current_kind())


def current_kind() -> str:
    """The ``device_kind`` of the current mesh, else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind
