"""``prune``: a run with fewer experts, made of a trained one; it is evaluated and trained on like any run.

WORKDIR --routing.json: what every expert's loss costs--> TO/config.json, TO/checkpoints/, TO/pruned.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.experiment import RUN_CONFIG, Experiment, plan
from vl_jax.layout import Variables
from vl_jax.moe.specialise import pruning
from vl_jax.moe.specialise.replacing import with_layers
from vl_jax.moe.stacks import Stack
from vl_jax.report.routing import FIGURES_FILE, write_routing
from vl_jax.runs import restore_at
from vl_jax.runtime import disk
from vl_jax.train import saved
from vl_jax.train.program import Program

PRUNED_FILE = "pruned.json"


def prune(
    workdir: Path,
    target: Path,
    *,
    share: float,
    merge: bool = False,
    random: int | None = None,
    num_batches: int = 4,
) -> Path:
    """Writes the run with a share of the experts of every sparse layer less; returns its folder.

    The optimiser begins afresh.

    Args:
      merge: those that go are merged into others, instead of left out.
      random: seed by which experts are chosen at random, for comparison; None: the least harmful ones go.
      num_batches: of the knock-out table, where ``inspect routing`` has written none of this checkpoint.

    Raises:
      ValueError: the folder is there already, or the model's experts cannot be fewer.
    """
    if target.exists():
        raise ValueError(f"--to={target}: exists already")
    experiment, layout, state, position = restore_at(workdir)
    step = position.global_step
    _refuse_numbers(experiment)
    parts: Mapping[str, Stack] = layout.model.config.stacks
    if not parts:
        raise ValueError(f"--workdir={workdir}: the model has no routed experts")
    fewer = {name: pruning.smaller(stack.moe, share) for name, stack in parts.items()}
    tables = _tables(workdir, step, num_batches)
    params, routing = params_lib.flatten(jax.device_get(state.params)), {}
    chosen: dict[str, Any] = {}
    for name, stack in parts.items():
        table, count = tables[name], fewer[name].num_experts
        harm = np.asarray(table["knockout"]) - table["loss"]
        kept = pruning.least_harmful(harm, count)
        if random is not None:
            kept = pruning.at_random(harm.shape[0], harm.shape[1], count, random)
        mixing = pruning.choosing(kept, stack.moe.num_experts)
        if merge:
            load = np.asarray(table["load"], np.float64).sum(axis=1)
            mixing = pruning.merging(kept, load, _routers(params, stack))
        params |= _mixed(params, stack, mixing, kept)
        routing[name] = pruning.mix_state(jax.device_get(state.routing[name]), mixing, stack.moe)
        chosen[name] = {"kept": kept.tolist(), "mixing": mixing.tolist() if merge else None}
    changed = with_layers(experiment, {parts[name].moe: moe for name, moe in fewer.items()})
    variables = Variables(params_lib.unflatten(params), routing, jax.device_get(state.collections))
    _write(target, changed, variables, dataclasses.replace(position, line=None, guard=None))
    record = {"source": str(workdir), "step": step, "share": share, "random": random, "stacks": chosen}
    disk.write_text(target / PRUNED_FILE, json.dumps(record, indent=1) + "\n")
    return target


def _refuse_numbers(experiment: Experiment) -> None:
    """Refuses an experiment that names experts by number, which others would have afterwards."""
    stages = [stage.name for stage in experiment.stages if stage.experts or stage.lora_only.experts]
    if stages or getattr(experiment.model, "domains", None):
        where = f"config.stages.{stages[0]}" if stages else "config.model.domains"
        raise ValueError(f"{where} names experts by number, and with fewer of them these are others")


def _tables(workdir: Path, step: int, num_batches: int) -> dict[str, Any]:
    """The figures of ``inspect routing`` by stack; the knock-out table among them."""
    path = workdir / FIGURES_FILE
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8"))["step"] != step:
        write_routing(workdir, num_batches=num_batches)
    figures = json.loads(path.read_text(encoding="utf-8"))
    return {figures["stack"]: figures, **figures["other_stacks"]}


def _routers(params: Mapping[str, np.ndarray], stack: Stack) -> np.ndarray:
    return np.concatenate([params["/".join((*run, "router"))] for run in stack.runs])


def _mixed(
    params: Mapping[str, np.ndarray], stack: Stack, mixing: np.ndarray, kept: np.ndarray
) -> dict[str, np.ndarray]:
    """The leaves of a stack's layers with fewer experts."""
    found, first = {}, 0
    for run in stack.runs:
        at = "/".join(run) + "/"
        leaves = {path[len(at) :]: leaf for path, leaf in params.items() if path.startswith(at)}
        layers = slice(first, first + len(leaves["w_in"]))
        mixed = pruning.mix(leaves, mixing[layers], kept[layers])
        found |= {at + name: leaf for name, leaf in mixed.items()}
        first = layers.stop
    return found


def _write(target: Path, experiment: Experiment, variables: Variables, position: saved.Position) -> None:
    """The folder of a run that stands at a position."""
    layout = plan(experiment)
    program = Program.of(layout, saved.stage_at(experiment.stages, position), seed=experiment.seed)
    placed = jax.device_put(variables.params, jax.tree.map(lambda leaf: leaf.sharding, layout.params))
    state = program.begin(variables._replace(params=placed), jax.random.key(experiment.seed))
    state = dataclasses.replace(state, step=np.asarray(position.step, np.int32))
    target.mkdir(parents=True)
    disk.write_text(target / RUN_CONFIG, schema.to_json(experiment))
    training, record = saved.to_saved(state)
    checkpointer = Checkpointer(target / CHECKPOINTS)
    try:
        record = {"position": dataclasses.asdict(position), **record}
        checkpointer.save(position.global_step, params=state.params, training=training, record=record)
    finally:
        checkpointer.close()
