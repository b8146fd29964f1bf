"""Heads on demand: a head has a folder of its own, and joins a model that has the streams it reads.

    vl_jax.export_head("runs/roads", "depth", "heads/depth")
    run = vl_jax.add_head("runs/other", "depth", checkpoint="heads/depth")
    vl_jax.predict(run, image="street.png", heads="depth")

Heads do not act on one another: what the others say stays the same to the bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax import schema, sharding
from vl_jax.api.calls import load_run
from vl_jax.api.part import joint_of, load_heads
from vl_jax.api.run import Run
from vl_jax.experiment import Experiment, example_batch
from vl_jax.heads.build import AnyHead
from vl_jax.interop import heads as stored_heads
from vl_jax.interop.heads import StoredHead, StreamWidths
from vl_jax.layout import Layout, init_leaves, plan_layout
from vl_jax.moe import stacks
from vl_jax.runtime import errors, start
from vl_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)


@overload
def add_head(
    params: Run | str | PathLike[str], task: Any, *, checkpoint: str | PathLike[str] | None = None
) -> Run: ...


@overload
def add_head(
    params: Mapping[str, Any], task: Any, *, checkpoint: str | PathLike[str] | None = None
) -> dict[str, Any]: ...


def add_head(
    params: Run | str | PathLike[str] | Mapping[str, Any],
    task: Any,
    *,
    checkpoint: str | PathLike[str] | None = None,
    seed: int = 0,
) -> Run | dict[str, Any]:
    """A model with one head more; what the others say stays the same to the bit.

    Args:
      params: an open run or its folder, which gives a run; or the parameters of a joint model, which gives
        parameters: its config then needs the head too (``read_head(checkpoint).config``).
      task: name of the head in the model; or the config of a head.
      checkpoint: folder that ``export_head`` wrote. None: the head of the config ``task``, created afresh.
      seed: of a head that is created.

    Raises:
      UserError: the folder is none of a head, or damaged; the model has a head of that name, or lacks a
        stream, or has one of other widths; without a checkpoint, ``task`` is no config or ``params`` no run.
    """
    start.set_up()
    with errors.told():
        stored = None if checkpoint is None else stored_heads.read_head(Path(checkpoint))
        variables = None if stored is None else stored.variables()  # before what takes longer
        config = _config_of(task, stored)
        if isinstance(params, Mapping):
            return _with_params(params, config.name, variables)
        run = params if isinstance(params, Run) else load_run(params)
        return _extended(run, config, stored, seed)


def remove_head(run: Run, name: str) -> Run:
    """A run without one of its heads; what the others say stays the same to the bit.

    Raises:
      UserError: there is no such head, or no other one.
    """
    start.set_up()
    with errors.told():
        model = joint_of(run.experiment.model, run.workdir)
        model.head(name)
        smaller = dataclasses.replace(model, heads=tuple(h for h in model.heads if h.name != name))
        experiment = dataclasses.replace(run.experiment, model=smaller)
        layout = _planned(run, experiment)
        collections = {
            key: {module: of for module, of in tree.items() if module != name}
            for key, tree in run.state.collections.items()
        }
        left = {module: tree for module, tree in run.params.items() if module != name}
        state = dataclasses.replace(run.state, params=left, collections=collections)
        return dataclasses.replace(run, experiment=experiment, layout=layout, state=state)


def export_head(run: Run | str | PathLike[str], head: str, folder: str | PathLike[str]) -> Path:
    """Writes a head of a run into a folder of its own, which must not exist; gives the folder.

    Raises:
      UserError: there is no such run or head, or the folder exists.
    """
    start.set_up()
    with errors.told():
        opened = run if isinstance(run, Run) else load_heads(Path(run), [head])
        model = joint_of(opened.experiment.model, opened.workdir)
        config, streams = model.head(head), _widths(opened)
        collections = {k: {head: tree[head]} for k, tree in opened.state.collections.items() if head in tree}
        variables = {"params": {head: opened.params.get(head, {})}, **collections}
        stored_heads.write_head(
            Path(folder),
            config,
            {name: tree[head] for name, tree in variables.items()},
            {name: streams[name] for name in config.inputs},
            trunk=stored_heads.trunk_mark(opened.params, model.trunk_of(head)),
        )
        return Path(folder)


def read_head(folder: str | PathLike[str]) -> StoredHead:
    """The head of a folder: its ``config``, and its parameters when they are asked for.

    Raises:
      UserError: it is no such folder, or damaged.
    """
    with errors.told():
        return stored_heads.read_head(Path(folder))


def _config_of(task: Any, stored: StoredHead | None) -> Any:
    """The config of a head by the name that it is to have."""
    if isinstance(task, str):
        if stored is None:
            raise UserError(f"task={task!r}: without a checkpoint, expected the config of a head")
        return dataclasses.replace(stored.config, name=task)
    schema.rebuild(schema.to_tree(task), AnyHead, "task")
    if stored is not None and dataclasses.replace(stored.config, name=task.name) != task:
        raise UserError(f"task: the head in {stored.folder} has another config: {stored.config}")
    return task


def _with_params(params: Mapping[str, Any], name: str, variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """Parameters with those of a stored head."""
    if variables is None:
        raise UserError("params: a head without a checkpoint needs an open run, which knows its streams")
    _check_new(name, params)
    if rest := variables.keys() - {"params"}:
        raise UserError(f"head {name!r} has {', '.join(sorted(rest))} too; add it to an open run")
    return {**params, name: jax.tree.map(jnp.asarray, variables.get("params", {}))}


def _check_new(name: str, known: Any) -> None:
    if name in known:
        raise UserError(f"head {name!r}: the model has something of that name; give task another one")


def _extended(run: Run, config: Any, stored: StoredHead | None, seed: int) -> Run:
    """A run with one head more, stored or created."""
    model = joint_of(run.experiment.model, run.workdir)
    _check_new(config.name, [part.name for part in (*model.towers, *model.heads)])
    if stored is not None:
        _check_streams(stored, _widths(run), run.workdir)
    larger = dataclasses.replace(model, heads=(*model.heads, config))
    experiment = dataclasses.replace(run.experiment, model=larger)
    layout = _planned(run, experiment)
    every = params_lib.flatten({"params": layout.params, **layout.collections})
    # The name of a module stands behind that of its collection.
    need = {path: leaf for path, leaf in every.items() if path.split("/")[1] == config.name}
    if stored is None:
        example = example_batch(experiment, sharding.batch_axes(layout.mesh))
        new = init_leaves(layout, example, seed, need.keys())
    else:
        new = _placed(stored, config.name, need)
        mark = stored_heads.trunk_mark(run.params, larger.trunk_of(config.name))
        if mark != stored.trunk:
            logger.warning(
                "head %r of %s was trained on other weights of %s than %s has: what it says may be wrong",
                *(config.name, stored.folder, ", ".join(larger.trunk_of(config.name)), run.workdir),
            )
    have = params_lib.flatten({"params": run.params, **run.state.collections})
    tree = params_lib.unflatten({**have, **new})
    collections = {name: of for name, of in tree.items() if name != "params"}
    state = dataclasses.replace(run.state, params=tree["params"], collections=collections)
    return dataclasses.replace(run, experiment=experiment, layout=layout, state=state)


def _check_streams(stored: StoredHead, found: Mapping[str, StreamWidths], workdir: Path) -> None:
    for name, expected in stored.streams.items():
        if name not in found:
            known = ", ".join(found)
            raise UserError(f"{stored.folder}: the head reads stream {name!r}; {workdir} has {known}")
        if found[name] != expected:
            raise UserError(
                f"{stored.folder}: stream {name!r} of {workdir} has {found[name]}, the head needs "
                f"{expected}; it is for another encoder"
            )


def _placed(stored: StoredHead, name: str, need: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves of a stored head where the model has a place for them."""
    paths = {path.replace(f"/{name}/", "/", 1): path for path in need}
    shapes = {short: tuple(need[path].shape) for short, path in paths.items()}
    odd = sorted(p for p in shapes.keys() | stored.shapes.keys() if shapes.get(p) != stored.shapes.get(p))
    if odd:
        there, here = stored.shapes.get(odd[0]), shapes.get(odd[0])
        raise UserError(
            f"{stored.folder}: {odd[0]} is {there or 'not there'}, the model needs {here or 'none'}; the "
            "head is for other maps"
        )
    values = params_lib.flatten(stored.variables())
    return {path: _put(values[short], need[path]) for short, path in paths.items()}


def _put(value: np.ndarray, leaf: Any) -> jax.Array:
    cast = value.astype(leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: cast[index])


def _planned(run: Run, experiment: Experiment) -> Layout:
    mesh, rules = run.layout.mesh, run.layout.rules
    return plan_layout(experiment.model, example_batch(experiment, sharding.batch_axes(mesh)), mesh, rules)


def _widths(run: Run) -> dict[str, StreamWidths]:
    """How wide the streams are that heads see, by name."""
    layout = run.layout
    example = example_batch(run.experiment, sharding.batch_axes(layout.mesh))
    routing = stacks.init_state(layout.model.config.stacks)
    with sharding.use_mesh(layout.mesh, layout.rules):
        variables = {"params": layout.params, **layout.collections}
        output: Any = jax.eval_shape(layout.model.apply, variables, example, routing)
    return {name: StreamWidths.of(stream) for name, stream in output.streams.items()}
