"""One stage of a run on devices that are not there: its real step, compiled, and what follows from it.

    rehearse(layout, stage, example, where) -> Rehearsal
        memory        bytes on one device: parameters, optimiser, what the compiler adds
        findings      what is whole on every device, does not divide, or travels more than it must
        collectives   by kind and mesh axes
        estimate      how long a step takes at best, and the share of the peak that is

Nothing is allocated and nothing runs. The estimate is a bound by peaks, not a measurement.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.fit import checks, program_text
from vl_jax.fit.chips import GIB, Slice
from vl_jax.fit.flops import STEP_PASSES
from vl_jax.fit.program_text import Collective
from vl_jax.kernels import aot
from vl_jax.layout import Layout
from vl_jax.moe.bounded import rooms
from vl_jax.moe.bounded.rooms import Traffic
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage

LARGE = 1 << 20  # bytes; what is smaller may be whole on every device
# By so much the temporaries of a run may exceed those of a program that was compiled with less effort:
# a run's compiler fetches ahead. Measured: 1.34 (three layers of the tiny model on v5e:2x4).
MARGIN = 1.4
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory|exceeds available|HbmOom", re.IGNORECASE)
_NEEDS = re.compile(r"[Uu]sed ([\d.]+)([GMK]) of ([\d.]+)([GMK])")


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device. What is exact follows from shapes and shardings; the rest the compiler says."""

    parameters: int  # exact
    optimizer: int  # exact
    others: int  # exact: adapters, collections, state of routing
    batch: int  # exact
    temporaries: int | None  # activations and all else that lives within a step; None: not compiled
    limit: int  # what a program may use

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.optimizer + self.others

    @property
    def total(self) -> int | None:
        """All of it at once; None where the compiler gave no answer."""
        return None if self.temporaries is None else self.state + self.batch + self.temporaries


@dataclasses.dataclass(frozen=True)
class Remark:
    """Something to look at: what it is about, what it is, and what to do."""

    what: str
    about: str
    remedy: str
    size: int = 0  # bytes on one device
    is_fault: bool = True  # else it is only said


@dataclasses.dataclass(frozen=True)
class StepBound:
    """A step's time from peaks: products, memory traffic and links do not wait for one another."""

    flops: float  # of the model a device and step, three times its forward pass
    compute_seconds: float
    memory_seconds: float | None  # reading and writing what the compiler counts; loops count once
    link_seconds: float | None
    seconds: float  # the longest of these
    mfu: float | None  # flops over what the device could do in that time; None: not compiled


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What is known of one stage on a slice."""

    stage: str
    topology: str
    slices: int
    devices: int
    mesh: Mapping[str, int]
    rows: int
    memory: DeviceMemory
    findings: Sequence[Remark]
    collectives: Sequence[Collective] | None  # None: the program was not compiled, or cannot be shown
    estimate: StepBound
    compile_seconds: float | None  # of CPU time
    thorough: bool  # whether it was compiled with the effort of a run
    refusal: str = ""  # what the compiler said, where it compiled nothing
    exchanges: Sequence[Traffic] = ()  # what rooms of ``ragged`` are planned for, on one device

    @property
    def fits(self) -> bool:
        """Whether a device has room for the step."""
        if self.refusal:
            return False
        total = self.memory.total
        return (self.memory.state + self.memory.batch if total is None else total) <= self.memory.limit

    @property
    def is_close(self) -> bool:
        """Whether a run's own program, which is compiled with more effort, may need more than there is."""
        memory = self.memory
        if self.thorough or not self.fits or memory.total is None or memory.temporaries is None:
            return False
        return memory.total + (MARGIN - 1) * memory.temporaries > memory.limit


def abstract_batch(layout: Layout, example: Batch, rows: int) -> Any:
    """Shapes of a batch of so many rows, each where it lives."""
    place = sharding.batch_sharding(layout.mesh, layout.rules)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place), example
    )


def lower(program: Program, batch: Any) -> jax.stages.Lowered:
    """The step of a program, for the devices of its mesh."""
    layout = program.layout
    state, number = program.abstract_state, jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.replicated)
    with sharding.use_mesh(layout.mesh, layout.rules):
        return program.step.lower(state, batch, number, number)  # pyright: ignore[reportFunctionMemberAccess]


def rehearse(
    layout: Layout,
    stage: Stage,
    example: Batch,
    where: Slice,
    *,
    flops: float,
    compiles: bool = True,
    thorough: bool = False,
) -> Rehearsal:
    """What a stage needs on a slice.

    Args:
      layout: on a mesh of the slice's devices.
      example: a batch of any number of rows.
      flops: of the forward pass of the whole batch; see ``flops.forward_flops``.
      compiles: False: only what is exact without a compiler.
      thorough: compile with the effort of a run; see ``aot.compile_absent``.
    """
    program, batch = Program.of(layout, stage), abstract_batch(layout, example, stage.batch_size)
    memory = _exact(program, batch, where)
    findings = [*_placements(layout)]
    compiled, refusal, seconds, plans = None, "", None, []
    if compiles:
        start = time.process_time()
        try:
            with rooms.noted() as plans:
                lowered = lower(program, batch)
            compiled = aot.compile_absent(lowered, quick=not thorough)
        except jax.errors.JaxRuntimeError as error:
            if not _NO_MEMORY.search(str(error)):
                raise
            refusal = _short(str(error))
        seconds = time.process_time() - start
    moved = None
    if compiled is not None:
        stats = compiled.memory_analysis()
        if stats is not None:
            memory = dataclasses.replace(memory, temporaries=stats.temp_size_in_bytes)
        findings += _spread_no_more(compiled, program)
        text = aot.text_of(compiled)
        if text is not None:
            moved = program_text.collectives(text, layout.mesh)
            findings += _travels(moved, layout)
            findings += _whole_logits(text, layout, stage, example)
    cost = (compiled.cost_analysis() or {}) if compiled is not None else {}
    result = Rehearsal(
        stage=stage.name,
        topology=where.name,
        slices=where.number,
        devices=where.num_devices,
        mesh=dict(layout.mesh.shape),
        rows=stage.batch_size,
        memory=memory,
        findings=findings,
        collectives=moved,
        estimate=_estimate(flops, cost.get("bytes accessed"), moved, where),
        compile_seconds=seconds,
        thorough=thorough,
        refusal=refusal,
        exchanges=plans,
    )
    if result.is_close:
        share = f"up to {round(100 * (MARGIN - 1))} % more temporaries"
        findings.append(Remark("may not fit", "the step", f"a run may need {share}: see --thorough"))
    elif not result.fits:
        findings.append(_too_large(result))
    return dataclasses.replace(result, findings=findings)


def on_device(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _exact(program: Program, batch: Any, where: Slice) -> DeviceMemory:
    state = program.abstract_state
    parameters, optimizer = on_device(state.params), on_device(state.optimizer)
    return DeviceMemory(
        parameters=parameters,
        optimizer=optimizer,
        others=on_device(state) - parameters - optimizer,
        batch=on_device(batch),
        temporaries=None,
        limit=where.chip.memory,
    )


def _placements(layout: Layout) -> list[Remark]:
    """Parameters that do not divide, or are whole along axes of the mesh that are there to cut them."""
    found, mesh = [], layout.mesh.shape
    for path, leaf in params_lib.flatten(layout.params).items():
        placement, size = layout.placements[path], on_device(leaf)
        if size < LARGE or layout.mesh.size == 1:
            continue
        used = {
            axis for part in leaf.sharding.spec for axis in ((part,) if isinstance(part, str) else part or ())
        }
        if placement.whole:
            remedy = "choose mesh sizes that divide it, or a rule that cuts another dimension"
            found.append(Remark(f"does not divide: {', '.join(placement.whole)}", path, remedy, size))
        elif mesh["fsdp"] > 1 and "fsdp" not in used:
            remedy = "give one of its dimensions a name that is cut, such as embed"
            found.append(Remark("whole along fsdp", path, remedy, size))
        elif not used and mesh["fsdp"] == 1:
            found.append(Remark("whole everywhere", path, "config.mesh.fsdp cuts it", size, is_fault=False))
    return found


def _spread_no_more(compiled: jax.stages.Compiled, program: Program) -> list[Remark]:
    """State that a step gives back with more of it on a device than it took."""
    given = compiled.output_shardings[0]
    remedy = "constrain what computes it to where its parameter lives"
    found = checks.misplaced(given, program.abstract_state, least=LARGE)
    return [Remark("spread no more after the step", path, remedy, size) for path, size in found]


def _whole_logits(text: str, layout: Layout, stage: Stage, example: Batch) -> list[Remark]:
    """Logits that exist for all positions at once."""
    found = checks.whole_logits(
        program_text.arrays(text),
        layout,
        rows=stage.batch_size // stage.accumulation,
        positions=example.targets.shape[1],
        size_of=program_text.size_of,
    )
    remedy = "compute the loss a chunk at a time, as losses.head_cross_entropy does"
    return [Remark("logits of all positions at once", path, remedy, size) for path, size in found if size]


def _travels(moved: Sequence[Collective], layout: Layout) -> list[Remark]:
    """Collectives that carry more than they must: weights in float32, all experts, whole gradients.

    What is said of one array is said once, with the bytes of a step, if these are at least ``LARGE``.
    """
    found: dict[tuple[str, str, str], int] = {}  # bytes by what, of which array, and the remedy
    weights = [
        # A loop over layers moves a matrix of a stack at a time; of a matrix alone it moves no single row.
        (path, _kind(leaf.shape), _kind(leaf.shape[leaf.ndim > 2 :]), layout.placements[path])
        for path, leaf in params_lib.flatten(layout.params).items()
        if leaf.size * leaf.dtype.itemsize >= LARGE
    ]
    dtype = getattr(layout.model.config, "dtype", "float32")
    for item in moved:
        shapes = {_kind(shape) for shape in item.shapes}
        path, placement = next(
            ((path, place) for path, whole, layer, place in weights if shapes & {whole, layer}), ("", None)
        )
        if placement is None:
            continue
        carried = item.size * item.times
        said = []
        # Routers and norms are used in float32 whatever the model's dtype.
        narrow = dtype == "bfloat16" and (placement.role.is_matrix or "vocab" in placement.names)
        if item.kind == "all-gather" and narrow and "f32" in item.dtypes:
            said.append(("gathered in float32, used in bfloat16", path, "cast before the gather"))
        if item.kind == "all-gather" and "experts" in placement.names and layout.mesh.shape["expert"] > 1:
            if "expert" in item.axes:
                said.append(("all experts gathered on every device", path, "choose another exchange"))
        if item.kind == "all-reduce" and any(part is not None for part in placement.spec):
            if not set(item.axes) <= {"data"}:
                remedy = "scatter the sum to where the moments live"
                said.append(("gradient summed whole on every device", path, remedy))
        for key in said:
            found[key] = found.get(key, 0) + carried
    return [Remark(*key, carried) for key, carried in found.items() if carried >= LARGE]


def _kind(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as it is found again where the compiler has turned it, or dropped sides of 1."""
    return tuple(sorted(n for n in shape if n > 1))


def _estimate(
    flops: float, traffic: float | None, moved: Sequence[Collective] | None, where: Slice
) -> StepBound:
    mine, chip = STEP_PASSES * flops / where.num_devices, where.chip
    times = [mine / chip.flops]
    memory = None if not traffic or traffic < 0 else traffic / chip.bandwidth
    links = None if moved is None else sum(c.size * c.times for c in moved) / chip.links
    seconds = max([*times, *(t for t in (memory, links) if t is not None)])
    known = memory is not None or links is not None
    return StepBound(mine, times[0], memory, links, seconds, mine / (seconds * chip.flops) if known else None)


def _too_large(found: Rehearsal) -> Remark:
    memory, advice = found.memory, []
    if found.mesh.get("fsdp", 1) * found.mesh.get("expert", 1) < found.devices:
        advice.append("raise config.mesh.fsdp or config.mesh.expert")
    if memory.state < memory.limit:
        advice.append("lower batch_size, raise accumulation, or set model.language.remat=full")
    advice.append("take a larger slice (fit --smallest finds it)")
    said = found.refusal or f"{(memory.total or memory.state) / GIB:.2f} of {memory.limit / GIB:.2f} GiB"
    return Remark(f"does not fit: {said}", "the step", "; ".join(advice), memory.total or memory.state)


def _short(message: str) -> str:
    """What a compiler says of memory, in one line."""
    found = _NEEDS.search(message)
    if found:
        return f"needs {found[1]} {found[2]}iB, a device has {found[3]} {found[4]}iB"
    return message.splitlines()[0][:200]
