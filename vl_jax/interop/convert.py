"""``convert``: a published folder to a checkpoint that training reads, and back.

    published folder  <->  checkpoints/0   parameters and routing state, in the dtypes of the weights
                           published/      config.json, tokenizer, and the tensors that are not ours

Either result appears under its name only when it is complete. Host memory holds the parameters and little
more than a second copy of the largest: they are stored, restored and written one after the other.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.checkpoint import Checkpointer
from vl_jax.interop.folder import write_folder
from vl_jax.interop.pretrained import (
    Published,
    load_params,
    read_published,
    routing_targets,
    side_files,
    write_published,
)
from vl_jax.layout import Layout, plan_layout, smallest_batch
from vl_jax.model import VisionLanguage
from vl_jax.sharding import MeshConfig, make_mesh

PUBLISHED, CHECKPOINTS = "published", "checkpoints"


def convert(source: Path, target: Path) -> None:
    """Converts a published folder to a checkpoint, or a checkpoint made so to a published folder.

    Raises:
      ValueError: the source is neither, or damaged; or the target exists.
    """
    if target.exists():
        raise ValueError(f"--to={target}: exists already")
    if (source / PUBLISHED).is_dir():
        _to_published(source, target)
    else:
        _to_checkpoint(read_published(source), target)


def _to_checkpoint(published: Published, target: Path) -> None:
    dtypes = _leaf_dtypes(published)
    layout = _layout(published, dtypes)
    params, state = load_params(published, layout)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        used = {key for leaf in published.plan(_tree(layout, published)).leaves for _, key in leaf.sources()}
        kept = {key: entry for key, entry in published.weights.entries.items() if key not in used}
        arrays = ((key, published.weights[key]) for key in kept)
        write_folder(partial / PUBLISHED, published.fields, kept, arrays, copies=side_files(published.folder))
        checkpointer = Checkpointer(partial / CHECKPOINTS, in_flight=_largest(layout))
        with _no_word_of_merging():
            checkpointer.save(0, params=params, training=_training(state), record={"dtypes": dtypes})
            checkpointer.close()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _no_word_of_merging() -> Iterator[None]:
    """Without the one warning that files of one leaf each are no data base that needed merging."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in str(record.msg)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _to_published(source: Path, target: Path) -> None:
    published = read_published(source / PUBLISHED)
    dtypes = _stored_dtypes(source / CHECKPOINTS)
    layout = _layout(published, dtypes)
    state = routing_targets(published, layout)
    checkpointer = Checkpointer(source / CHECKPOINTS, in_flight=_largest(layout))
    try:
        restored = checkpointer.restore(
            params=layout.params, training_of=lambda _: _training_targets(state, layout)
        )
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"{source / CHECKPOINTS}: holds no checkpoint")
    _, params, training, _ = restored
    write_published(target, params, training.get("routing", {}), published, dtypes=dtypes)


def _training(state: Any) -> dict[str, Any]:
    # Storage takes no empty tree, and a scheme may have no state.
    return {"step": jnp.zeros((), jnp.int32), **({"routing": state} if state else {})}


def _training_targets(state: Any, layout: Layout) -> dict[str, Any]:
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    return {"step": step, **({"routing": state} if state else {})}


def _leaf_dtypes(published: Published) -> dict[str, str]:
    """For every parameter the dtype of the tensors it is made of, the widest if they differ."""
    abstract = params_lib.flatten(_tree(_layout(published, {}), published))
    found = {}
    for leaf in published.plan(params_lib.unflatten(abstract)).leaves:
        entries = published.weights.entries
        dtypes = {entries[key].dtype for _, key in leaf.sources() if key in entries}
        found[leaf.path] = str(np.result_type(*dtypes)) if dtypes else str(abstract[leaf.path].dtype)
    return found


def _layout(published: Published, dtypes: dict[str, str]) -> Layout:
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    example = smallest_batch(published.config, rows=sharding.batch_axes(mesh))
    layout = plan_layout(VisionLanguage(published.config), example, mesh)

    def typed(path: str, leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, dtypes.get(path, leaf.dtype), sharding=leaf.sharding)

    return dataclasses.replace(layout, params=params_lib.map_paths(typed, layout.params))


def _stored_dtypes(folder: Path) -> dict[str, str]:
    """The dtypes that a checkpoint of ``convert`` says its published side had."""
    checkpointer = Checkpointer(folder)
    try:
        return checkpointer.record()["dtypes"]
    finally:
        checkpointer.close()


def _largest(layout: Layout) -> int:
    """Bytes of the largest parameter."""
    return max(leaf.size * leaf.dtype.itemsize for leaf in params_lib.flatten(layout.params).values())


def _tree(layout: Layout, published: Published) -> dict[str, Any]:
    state = routing_targets(published, layout)
    return {**layout.params, **({"routing": state} if state else {})}
