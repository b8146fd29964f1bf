"""Which settings of a stage fit a slice, and which of them is the fastest by estimate; the smallest slice.

    settings(stage, devices, ...) -> [Setting(mesh, rows, accumulation, remat), ...]
    rank(rehearsals)              -> those that fit, the fastest first

The exact bytes of the state sort out what cannot fit; the compiler sees only the most promising of the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from vl_jax.fit.chips import CHIPS, Slice
from vl_jax.fit.rehearsal import Rehearsal
from vl_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a search varies: mesh, rows of the batch, micro-batches, and what backward recomputes."""

    mesh: MeshConfig
    rows: int
    accumulation: int
    remat: str

    def overrides(self, stage: str) -> tuple[tuple[str, str], ...]:
        """The same as options of the command line."""
        mesh = dataclasses.asdict(self.mesh)
        return (
            *((f"mesh.{axis}", str(size)) for axis, size in mesh.items()),
            (f"stages.{stage}.batch_size", str(self.rows)),
            (f"stages.{stage}.accumulation", str(self.accumulation)),
            *((("model.language.remat", self.remat),) if self.remat else ()),
        )


def meshes(devices: int, *, experts: int = 1, most_tensor: int = 8) -> Iterator[MeshConfig]:
    """Meshes of so many devices: powers of two, experts that divide; the most data-parallel first.

    Args:
      experts: of the layer with the fewest; the axis of experts divides it.
      most_tensor: of the axis of heads and hidden widths, which talks in every layer.
    """
    sizes = [1 << n for n in range(devices.bit_length()) if devices % (1 << n) == 0]
    for tensor, expert, fsdp in itertools.product(sizes, sizes, reversed(sizes)):
        used = tensor * expert * fsdp
        if tensor > most_tensor or experts % expert or devices % used:
            continue
        yield MeshConfig(data=devices // used, fsdp=fsdp, expert=expert, tensor=tensor)


def settings(
    *,
    devices: int,
    rows: Sequence[int],
    accumulations: Sequence[int] = (1,),
    remats: Sequence[str] = ("",),
    experts: int = 1,
) -> list[Setting]:
    """All combinations whose rows divide by the shards of the batch."""
    found = []
    for mesh, size, parts, remat in itertools.product(
        meshes(devices, experts=experts), rows, accumulations, remats
    ):
        if size % (parts * mesh.data * mesh.fsdp * mesh.expert) == 0:
            found.append(Setting(mesh, size, parts, remat))
    return found


def rank(found: Iterable[tuple[Setting, Rehearsal]]) -> list[tuple[Setting, Rehearsal]]:
    """Those that fit, by rows a second as estimated; then those that do not, by what they need."""

    def key(item: tuple[Setting, Rehearsal]) -> tuple[bool, float]:
        _, rehearsal = item
        needs = rehearsal.memory.total or rehearsal.memory.state
        speed = rehearsal.rows / rehearsal.estimate.seconds
        return (not rehearsal.fits, -speed if rehearsal.fits else float(needs))

    return sorted(found, key=key)


def slices(generation: str) -> list[Slice]:
    """The slices of a generation, from the smallest on."""
    chip = CHIPS[generation]
    return [Slice(chip, shape) for shape in chip.shapes]
