"""A part of a run: some of its heads, and the towers that they stand on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vl_jax import sharding
from vl_jax.api.run import Run
from vl_jax.experiment import example_batch, read_run
from vl_jax.joint import JointConfig
from vl_jax.layout import plan_layout
from vl_jax.runtime.errors import UserError
from vl_jax.train import initial, saved
from vl_jax.train.lora import LoraConfig
from vl_jax.train.step import TrainState


def joint_of(model: Any, workdir: Path) -> JointConfig:
    """The config of a joint model; ``UserError`` if it is another one, which has no heads to choose from."""
    if not isinstance(model, JointConfig):
        raise UserError(
            f"{workdir}: its model is a {type(model).__name__}; only a JointConfig has heads that come and go"
        )
    return model


def heads_for(model: Any, workdir: Path, task: str, heads: Sequence[str] = ()) -> tuple[str, ...]:
    """The head that does a task; ``UserError`` if there is none, or if heads are named as well."""
    if heads:
        raise UserError(f"task {task!r} with heads {', '.join(heads)}: expected one of the two")
    return (joint_of(model, workdir).head_for(task),)


def load_heads(workdir: Path, names: Sequence[str]) -> Run:
    """Some heads of a run's newest checkpoint, and the towers that they stand on; nothing else is read.

    Raises:
      ValueError: the folder holds no run of a joint model or no sound checkpoint, or there is no such head.
    """
    before = read_run(workdir)
    model = joint_of(before.model, workdir)
    experiment = dataclasses.replace(before, model=model.only(tuple(dict.fromkeys(names))))
    mesh = sharding.make_mesh(experiment.mesh)
    layout = plan_layout(experiment.model, example_batch(experiment, sharding.batch_axes(mesh)), mesh)
    origin = initial.find(workdir)
    if origin is None:
        raise ValueError(f"--workdir={workdir} holds no checkpoint yet")

    def lora_of(record: Mapping[str, Any]) -> LoraConfig | None:
        return saved.stage_at(before.stages, saved.Position(**record["position"])).lora

    found, step = initial.load_part(origin, layout, lora_of=lora_of)
    step0, routing = jax.device_put((jnp.zeros((), jnp.int32), found.routing), layout.replicated)
    state = TrainState(step0, found.params, None, routing, collections=dict(found.collections))
    return Run(workdir, experiment, layout, state, step)
