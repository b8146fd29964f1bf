"""``convert``: a published folder to a checkpoint that training reads, and back.

    published folder  <->  checkpoints/0   parameters and routing state, in the dtypes of the weights
                           published/      config.json, tokenizer, and the tensors that are not ours

Either result appears under its name only when it is complete. Host memory never holds the model, only pieces
of one parameter. They are read twice: on the way there first for their checksums, on the way back first to
verify them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.interop import rules
from vl_jax.interop.folder import write_folder
from vl_jax.interop.pretrained import (
    ROUTING,
    Published,
    read_published,
    side_files,
    with_state,
    write_published,
)
from vl_jax.interop.vision_language import IGNORED
from vl_jax.layout import abstract
from vl_jax.model import LANGUAGE
from vl_jax.moe import stacks
from vl_jax.runtime.lazy_array import LazyArray

PUBLISHED = "published"


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
    shapes = _shapes(published)
    plan = published.plan(shapes)
    dtypes = _dtypes(plan, published, shapes)
    tree = rules.lazily(plan, published.weights, _typed(shapes, dtypes), ignored=IGNORED)
    state = tree.pop(ROUTING, {})
    used = {key for leaf in plan.leaves for _, key in leaf.sources()}
    kept = {key: entry for key, entry in published.weights.entries.items() if key not in used}
    arrays = ((key, published.weights[key]) for key in kept)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_folder(partial / PUBLISHED, published.fields, kept, arrays, copies=side_files(published.folder))
        checkpointer = Checkpointer(partial / CHECKPOINTS, lazy=True)
        with _no_word_of_merging():
            checkpointer.save(0, params=tree, training=_training(state), record={"dtypes": dtypes})
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
    params = _shapes(published)
    training = _training(params.pop(ROUTING, {}))
    checkpointer = Checkpointer(source / CHECKPOINTS, lazy=True)
    try:
        restored = checkpointer.restore(params=params, training_of=lambda _: training)
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"{source / CHECKPOINTS}: holds no checkpoint")
    _, params, training, record = restored
    write_published(target, params, {LANGUAGE: training.get(ROUTING, {})}, published, dtypes=record["dtypes"])


def _training(state: Any) -> dict[str, Any]:
    """What stands beside the parameters: storage takes no empty tree, and a scheme may have no state."""
    return with_state({"step": LazyArray.of(np.zeros((), np.int32))}, state)


def _shapes(published: Published) -> dict[str, Any]:
    """Parameters and routing state as shapes and dtypes of ours."""
    state = jax.eval_shape(lambda: stacks.init_state(published.config.stacks))
    return with_state(abstract(published.config), state.get(LANGUAGE, {}))


def _dtypes(plan: rules.Plan, published: Published, shapes: Any) -> dict[str, str]:
    """For every leaf the dtype of the tensors it is made of, the widest if they differ."""
    ours, entries, found = params_lib.flatten(shapes), published.weights.entries, {}
    for leaf in plan.leaves:
        dtypes = {entries[key].dtype for _, key in leaf.sources() if key in entries}
        found[leaf.path] = str(np.result_type(*dtypes) if dtypes else ours[leaf.path].dtype)
    return found


def _typed(shapes: Any, dtypes: dict[str, str]) -> Any:
    """The tree with parameters in the dtypes of the weights; routing state stays in its own."""

    def typed(path: str, leaf: Any) -> Any:
        kept = path.startswith(f"{ROUTING}/") or path not in dtypes
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtypes[path])

    return params_lib.map_paths(typed, shapes)
