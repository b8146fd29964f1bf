"""Rehearsals of an experiment: one stage on one slice, the best settings on it, or the smallest slice.

rehearse(experiment, slice_of("v5p:4x4x4"))     the stage that needs the most memory
search(experiment, where)                       settings, ranked
smallest(experiment)                            by generation of TPU
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from vl_jax import config, sharding
from vl_jax.experiment import Experiment, example_batch, plan
from vl_jax.fit import rehearsal
from vl_jax.fit.chips import CHIPS, Slice
from vl_jax.fit.flops import countable, forward_flops
from vl_jax.fit.rehearsal import Rehearsal
from vl_jax.fit.search import Setting, rank, settings, slices
from vl_jax.layout import plan_layout
from vl_jax.schema import ConfigError
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage

_COMPILED = 4  # settings of a search that the compiler sees


def rehearse(
    experiment: Experiment,
    where: Slice,
    *,
    stage: str | None = None,
    compiles: bool = True,
    thorough: bool = False,
) -> Rehearsal:
    """What a stage of an experiment needs on a slice.

    Args:
      stage: its name; None: the one whose state and batch take the most memory.
      compiles: False: only what is exact without a compiler.
      thorough: compile with the effort of a run, in more than twice the time.

    Raises:
      ValueError: there is no such stage, the mesh does not divide the devices, or libtpu is missing.
    """
    chosen = _chosen(experiment, stage)
    layout = plan(experiment, where.devices())
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))

    def needs(one: Stage) -> int:
        state = Program.of(layout, one).abstract_state
        batch = rehearsal.abstract_batch(layout, example, one.batch_size // one.accumulation)
        return rehearsal.on_device(state) + rehearsal.on_device(batch)

    one = max(chosen, key=needs)
    flops = _flops(experiment, one)
    options = {"compiles": compiles, "thorough": thorough}
    return rehearsal.rehearse(layout, one, example, where, flops=flops, **options)


def _on(
    experiment: Experiment, stage: Stage, where: Slice, devices: list[Any], flops: float
) -> Callable[[bool], Rehearsal]:
    """Rehearses one stage on devices that are known, by whether it is compiled.

    Raises:
      ValueError: mesh, batch or model do not divide so.
    """
    layout = plan(experiment, devices)
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    (one,) = _chosen(experiment, stage.name)
    return lambda compiles: rehearsal.rehearse(layout, one, example, where, flops=flops, compiles=compiles)


def _chosen(experiment: Experiment, name: str | None) -> Sequence[Stage]:
    found = [stage for stage in experiment.stages if name in (None, stage.name)]
    if not found:
        known = ", ".join(stage.name for stage in experiment.stages)
        raise ConfigError(f"--stage={name}: the experiment has {known}")
    return found


def _flops(experiment: Experiment, stage: Stage) -> float:
    """Of the forward pass of a stage's batch, counted on one device; the mesh and remat do not change it."""
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1, 1), jax.local_devices()[:1])
    example = example_batch(experiment, 1)
    return forward_flops(plan_layout(countable(experiment.model), example, mesh), stage, example)


def search(
    experiment: Experiment, where: Slice, *, stage: str | None = None, most: int = _COMPILED
) -> list[tuple[Setting, Rehearsal]]:
    """Meshes, micro-batches and remat policies of a stage on a slice, the best first.

    The exact bytes come first; of what they leave, ``most`` settings are compiled.

    Args:
      stage: its name; None: the last one.

    Raises:
      ValueError: there is no such stage, libtpu is missing, or no setting divides model and batch.
    """
    one, devices = _chosen(experiment, stage)[-1], where.devices()
    experts = [stack.moe.num_experts for stack in experiment.model.stacks.values()]
    candidates = settings(
        devices=where.num_devices,
        rows=(one.batch_size,),
        accumulations=tuple(n for n in (1, 2, 4, 8) if one.batch_size % n == 0),
        remats=_remats(experiment),
        experts=min(experts, default=1),
    )
    flops, ways, rough = _flops(experiment, one), {}, []
    refusal = f"batch_size={one.batch_size} divides by the batch shards of none of its meshes"
    for setting in candidates:
        try:
            ways[setting] = _on(_with(experiment, setting, one), one, where, devices, flops)
        except ValueError as error:  # this model cannot be cut so
            refusal = str(error)
            continue
        rough.append((setting, ways[setting](False)))
    if not rough:
        raise ConfigError(f"--search: no setting is for {where.name}; the last: {refusal}")
    ranked = rank(rough)
    promising = [setting for setting, found in ranked if found.fits][:most]
    return rank([(setting, ways[setting](True)) for setting in promising]) + ranked[len(promising) :]


def _remats(experiment: Experiment) -> tuple[str, ...]:
    language = getattr(experiment.model, "language", None)
    return ("none", "dots", "full") if hasattr(language, "remat") else ("",)


def _with(experiment: Experiment, setting: Setting, stage: Stage) -> Experiment:
    return config.replace(experiment, setting.overrides(stage.name))


def smallest(experiment: Experiment, *, stage: str | None = None) -> Iterator[tuple[str, Rehearsal | None]]:
    """For every generation the smallest slice on which a stage fits, on the experiment's mesh, if any.

    A slice whose devices cannot hold the state is passed over without compiling.

    Args:
      stage: its name; None: the last one.

    Raises:
      ValueError: there is no such stage, or libtpu is missing.
    """
    one = _chosen(experiment, stage)[-1]
    flops = _flops(experiment, one)
    for name in CHIPS:
        yield name, _smallest_of(name, experiment, one, flops)


def _smallest_of(generation: str, experiment: Experiment, stage: Stage, flops: float) -> Rehearsal | None:
    for where in slices(generation):
        devices = where.devices()
        try:
            way = _on(experiment, stage, where, devices, flops)
        except ValueError:  # mesh or batch do not divide so
            continue
        if way(False).fits and (found := way(True)).fits:
            return found
    return None
