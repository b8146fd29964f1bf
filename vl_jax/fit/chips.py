"""TPUs by generation: what a device has and can do at best, and the slices that one can rent.

    slice_of("v5p:4x4x8") -> Slice(chip, shape=(4, 4, 8), number=1)

Peaks, memory and bandwidth are Google's figures (cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and
tpu7x, read 2026-11). ``memory`` is what the compiler lets a program use, measured with libtpu 0.0.51.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from vl_jax.kernels import aot

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a generation, as jax counts devices: some chips are two."""

    name: str
    devices: int  # of a chip
    memory: int  # bytes that a program may use
    flops: float  # multiplications and additions of bfloat16 a second, at best
    bandwidth: float  # bytes a second between memory and device, at best
    links: float  # bytes a second to other devices of the slice, both ways together, at best
    shapes: tuple[tuple[int, ...], ...]  # of the slices, from the smallest on


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SOLID = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 2, int(15.25 * GIB), 137.5e12, 600e9, 150e9, _SOLID[:6]),
        Chip("v5e", 1, int(15.75 * GIB), 197e12, 819e9, 200e9, _FLAT),
        Chip("v5p", 1, int(95.73 * GIB), 459e12, 2765e9, 600e9, _SOLID),
        Chip("v6e", 1, int(31.24 * GIB), 918e12, 1640e9, 400e9, _FLAT),
        Chip("tpu7x", 2, int(94.74 * GIB), 1153.5e12, 3690e9, 600e9, _SOLID[:5]),
    )
}


# What a device of a run can do at best, by the beginning of the name that jax has for its kind: the longest
# counts. A device of v4 is a whole chip there. GPUs: NVIDIA's data sheets of A100, H100 SXM and H200, dense
# bfloat16.
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "TPU v7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
}


def peak_of(kind: str) -> float | None:
    """Operations of bfloat16 a second, at best, of a device of a kind as jax names it; None: not known."""
    known = [name for name in _PEAKS if kind.startswith(name) and "PCIe" not in kind]
    return _PEAKS[max(known, key=len)] if known else None


@dataclasses.dataclass(frozen=True)
class Slice:
    """Slices of one shape; several are joined by the network of the data centre."""

    chip: Chip
    shape: tuple[int, ...]
    number: int = 1

    @property
    def name(self) -> str:
        """As the command line has it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def num_devices(self) -> int:
        """Of all slices, as jax counts them."""
        return math.prod(self.shape) * self.chip.devices * self.number

    def devices(self) -> list[Any]:
        """The devices, for programs that are compiled and not run.

        Raises:
          ValueError: libtpu is not installed, or knows no such slice.
        """
        try:
            return aot.devices(self.name, slices=self.number)
        except ImportError as error:
            raise ValueError(f"--topology={self.name}: {error}; pip install libtpu") from error
        except Exception as error:  # libtpu raises what it likes
            raise ValueError(f"--topology={self.name}: {str(error).splitlines()[0]}") from error


def slice_of(topology: str, number: int = 1) -> Slice:
    """The slice of a name such as ``v5p:4x4x8``.

    Raises:
      ValueError: there is no such generation, or its slices have another shape.
    """
    name, _, sides = topology.partition(":")
    if name not in CHIPS:
        raise ValueError(f"--topology={topology}: {name!r} is no generation; there are: {', '.join(CHIPS)}")
    chip = CHIPS[name]
    dimensions = len(chip.shapes[0])
    if not re.fullmatch(r"\d+(x\d+)*", sides) or len(sides.split("x")) != dimensions:
        example = "x".join(map(str, chip.shapes[-2]))
        rule = f"a slice of {name} has {dimensions} sides, as {name}:{example}"
        raise ValueError(f"--topology={topology}: {rule}")
    if number < 1:
        raise ValueError(f"--slices={number}: must be at least 1")
    return Slice(chip, tuple(map(int, sides.split("x"))), number)
