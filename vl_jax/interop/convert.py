"""``convert``: a published folder to a checkpoint that training reads, and back.

    published folder  <->  checkpoints/0   parameters and routing state, in the dtypes of the weights
                           published/      config.json, tokenizer, and the tensors that are not ours
                           tensors.json    shape and dtype of every tensor there was

A tensor that its parameter does not hold bit for bit (quantised, or a NaN in a wider dtype) is kept as well.
Either result appears under its name only when it is complete. Host memory never holds the model, only pieces
of one parameter. They are read twice: on the way there first for their checksums, on the way back first to
verify them.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.interop import rules
from vl_jax.interop.folder import Weights, open_weights, read_config, write_folder
from vl_jax.interop.pretrained import (
    ROUTING,
    Published,
    describe,
    read_published,
    side_files,
    with_state,
    write_published,
)
from vl_jax.interop.safetensors import Entry, WeightsError
from vl_jax.layout import abstract
from vl_jax.model import LANGUAGE
from vl_jax.moe import stacks
from vl_jax.runtime import json_text
from vl_jax.runtime.lazy_array import LazyArray
from vl_jax.runtime.storage import folders

PUBLISHED, TENSORS = "published", "tensors.json"
_ITEMS = 1 << 20  # items that are compared at a time


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
        _to_checkpoint(source, target)


def _to_checkpoint(source: Path, target: Path) -> None:
    published, stored = read_published(source), open_weights(source)
    shapes = _shapes(published)
    plan = published.plan(shapes)
    dtypes = _dtypes(plan, published, shapes)
    tree = rules.lazily(plan, published.weights, _typed(shapes, dtypes), ignored=published.ignored)
    state = tree.pop(ROUTING, {})
    held = {key for key in _held(plan, stored, dtypes) if key not in published.weights.made}
    kept = {key: entry for key, entry in stored.entries.items() if key not in held}
    arrays = ((key, stored[key]) for key in kept)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write_folder(partial / PUBLISHED, published.fields, kept, arrays, copies=side_files(published.folder))
        _write_tensors(partial, published, stored)
        checkpointer = Checkpointer(partial / CHECKPOINTS, lazy=True)
        with _no_word_of_merging():
            checkpointer.save(0, params=tree, training=_training(state), record={"dtypes": dtypes})
            checkpointer.close()
        folders.move(partial, target, last=TENSORS)
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


def _held(plan: rules.Plan, stored: Weights, dtypes: Mapping[str, str]) -> Iterator[str]:
    """The tensors that the parameters hold bit for bit."""
    for leaf in plan.leaves:
        wide = np.dtype(dtypes[leaf.path])
        for _, key in leaf.sources():
            if key in stored.entries and _survives(stored, key, wide):
                yield key


def _survives(stored: Weights, key: str, wide: np.dtype) -> bool:
    """Whether a tensor comes back from another dtype as it was; a few items are looked at a time."""
    entry = stored.entries[key]
    if entry.dtype == wide:
        return True
    flat = stored[key].reshape(-1)
    for start in range(0, flat.size, _ITEMS):
        part = flat[start : start + _ITEMS]
        with np.errstate(all="ignore"):  # what is lost is found below
            back = part.astype(wide).astype(entry.dtype)
        if not np.array_equal(back.view(np.uint8), part.view(np.uint8)):
            return False
    return True


def _write_tensors(folder: Path, published: Published, stored: Weights) -> None:
    entries = {key: [str(entry.dtype), *entry.shape] for key, entry in stored.entries.items()}
    text = json.dumps({"tied": bool(published.copies), "entries": entries})
    (folder / TENSORS).write_text(text, encoding="utf-8")


def _read_tensors(source: Path) -> tuple[Published, Weights]:
    """The published checkpoint that a conversion was made of, and those of its tensors that were kept."""
    folder, file = source / PUBLISHED, source / TENSORS
    kept = open_weights(folder)
    try:
        found = json_text.read(file)
        entries = {key: Entry(tuple(shape), np.dtype(d)) for key, (d, *shape) in found["entries"].items()}
        tied = bool(found["tied"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{file}: not what a conversion writes: {error}") from None
    absent = {key: entry for key, entry in entries.items() if key not in kept.entries}
    return describe(folder, read_config(folder), kept, absent=absent, tied=tied), kept


def _to_published(source: Path, target: Path) -> None:
    if not (source / TENSORS).is_file():
        raise ValueError(
            f"{source}: lacks {TENSORS}; it was converted by an earlier version, which did not keep every "
            f"dtype: convert the published folder again"
        )
    published, stored = _read_tensors(source)
    params = _shapes(published)
    training = _training(params.pop(ROUTING, {}))
    checkpointer = Checkpointer(source / CHECKPOINTS, lazy=True, read_only=True)
    try:
        restored = checkpointer.restore(params=params, training_of=lambda _: training)
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"{source / CHECKPOINTS}: holds no checkpoint")
    _, params, training, _ = restored
    write_published(target, params, {LANGUAGE: training.get(ROUTING, {})}, published, unchanged=stored)


def _training(state: Any) -> dict[str, Any]:
    """What stands beside the parameters: storage takes no empty tree, and a scheme may have no state."""
    return with_state({"step": LazyArray.of(np.zeros((), np.int32))}, state)


def _shapes(published: Published) -> dict[str, Any]:
    """Parameters and routing state as shapes and dtypes of ours."""
    state = jax.eval_shape(lambda: stacks.init_state(published.config.stacks))
    return with_state(abstract(published.config), state.get(LANGUAGE, {}))


def _dtypes(plan: rules.Plan, published: Published, shapes: Any) -> dict[str, str]:
    """For every leaf the dtype of the tensors it is made of; if they differ, one that holds them all."""
    ours, entries, found = params_lib.flatten(shapes), published.weights.entries, {}
    for leaf in plan.leaves:
        dtypes = {entries[key].dtype for _, key in leaf.sources() if key in entries}
        found[leaf.path] = str(_common(dtypes) if dtypes else ours[leaf.path].dtype)
    return found


def _common(dtypes: Collection[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds the numbers of all of them."""
    if len(dtypes) == 1 or not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
        return next(iter(dtypes))  # what is no number of this kind is refused where it is read
    wider = [*sorted(dtypes, key=str), *(np.dtype(d) for d in (jnp.bfloat16, np.float32, np.float64))]
    fitting = [d for d in wider if all(_holds(d, other) for other in dtypes)]
    return min(fitting, key=lambda d: d.itemsize)


def _holds(wide: np.dtype, narrow: np.dtype) -> bool:
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp


def _typed(shapes: Any, dtypes: dict[str, str]) -> Any:
    """The tree with parameters in the dtypes of the weights; routing state stays in its own."""

    def typed(path: str, leaf: Any) -> Any:
        kept = path.startswith(f"{ROUTING}/") or path not in dtypes
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else dtypes[path])

    return params_lib.map_paths(typed, shapes)
