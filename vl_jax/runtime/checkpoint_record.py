"""The record of a checkpoint: what is known of its leaves, and the seal that covers it.

    {..., "leaves": {"params": {"['language']['head']": ["float32", [64, 32], 123456789]}, "training": {...}},
     "seal": "5f2c..."}

A leaf has dtype, shape and checksum. Earlier versions wrote ``checksums`` instead, of another kind, and no
seal.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vl_jax.runtime import checksums as checksums_lib
from vl_jax.runtime.checksums import checksums, earlier_checksums, examined

LEAVES, SEAL, EARLIER = "leaves", "seal", "checksums"
_MOST_TOLD = 12  # leaves that a message about another tree names
_KINDS = {"params": "another model", "training": "another optimiser or routing scheme"}
_NAMES = {"params": "parameters are", "training": "the training state is"}
Shape = tuple[int, ...]


def described(trees: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a record says of the leaves of the items, and which of them are not finite; empty if all are."""
    leaves, problem = {}, ""
    for item, tree in trees.items():
        sums, infinite_ = examined(tree)
        leaves[item] = {name: [str(x.dtype), list(x.shape), sums[name]] for name, x in _named(tree).items()}
        problem = problem or _infinite(item, map(plain, infinite_))
    return {LEAVES: leaves}, problem


def sealed(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it comes back from JSON, with the checksum of the step and of all the rest of it."""
    rest = json.loads(json.dumps({k: v for k, v in record.items() if k != SEAL}))
    text = json.dumps([step, rest], sort_keys=True)
    return {**rest, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def is_sound(step: int, record: Mapping[str, Any]) -> bool:
    """Whether a record is the one that was written with the step; of earlier ones nobody knows."""
    return SEAL not in record or dict(record) == sealed(step, record)


def shapes(item: str, record: Mapping[str, Any], stored: Any) -> dict[str, Shape | None]:
    """The shape of every leaf of an item by path; None where it is not known.

    Args:
      stored: the tree that storage says it has; its containers may be others than those of the tree saved.
    """
    if LEAVES in record:
        return {plain(k): tuple(shape) for k, (_, shape, _) in record[LEAVES][item].items()}
    found = {plain(k): tuple(x.shape) for k, x in _named(stored).items()}
    return {path: found.get(path) for path in map(plain, record[EARLIER][item])}


def differences(item: str, found: Mapping[str, Shape | None], wanted: Any) -> str:
    """The first leaves at which an item differs from the tree asked for; empty if none does.

    Args:
      found: what ``shapes`` gives.
    """
    need = {plain(name): tuple(leaf.shape) for name, leaf in _named(wanted).items()}
    have = {path: need.get(path, "present") if shape is None else shape for path, shape in found.items()}
    lines = [
        f"{p} is {have.get(p, 'absent')} in the checkpoint, {need.get(p, 'absent')} in the model"
        for p in sorted(have.keys() | need.keys())
        if have.get(p) != need.get(p)
    ]
    if not lines:
        return ""
    told = _first(lines, "; ", most=_MOST_TOLD)
    return (
        f"{_KINDS[item]}: {told}; {len(have)} leaves found, {len(need)} expected; go on with "
        "the options the run began with, or begin another run with --config.init"
    )


def as_stored(item: str, record: Mapping[str, Any], wanted: Any) -> Any:
    """The abstract tree with the dtypes that the leaves of an item have in the checkpoint.

    Raises:
      ValueError: a leaf is of another kind there, such as whole numbers in place of floating-point ones.
    """
    if LEAVES not in record:
        return wanted
    dtypes = {plain(name): jnp.dtype(dtype) for name, (dtype, *_) in record[LEAVES][item].items()}

    def stored(path: Any, leaf: Any) -> Any:
        name = plain(jax.tree_util.keystr(path))
        found: Any = dtypes.get(name, leaf.dtype)
        if found == leaf.dtype:
            return leaf
        if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (found, leaf.dtype)):
            raise ValueError(f"{name} is {found} in the checkpoint, {leaf.dtype} in the model")
        return jax.ShapeDtypeStruct(leaf.shape, found, sharding=leaf.sharding)

    return jax.tree_util.tree_map_with_path(stored, wanted)


def damage(item: str, record: Mapping[str, Any], tree: Any, *, whole: bool = True) -> str:
    """What is wrong with an item that was read; empty if nothing is.

    Args:
      whole: all of it was read, not some of its leaves.
    """
    if LEAVES in record:
        expected = {plain(name): sum_ for name, (*_, sum_) in record[LEAVES][item].items()}
        actual = checksums(tree)
    else:
        expected = {plain(name): sum_ for name, sum_ in record[EARLIER][item].items()}
        actual = earlier_checksums(tree)
    actual = {plain(name): sum_ for name, sum_ in actual.items()}
    names = expected.keys() | actual.keys() if whole else actual.keys()
    damaged = sorted(k for k in names if actual.get(k) != expected.get(k))
    return f"checksum of {item} differs at {', '.join(damaged[:3])}" if damaged else ""


def infinite(params: Any) -> str:
    """Which parameters are not finite; empty if all are."""
    return _infinite("params", not_finite(params))


def not_finite(tree: Any) -> list[str]:
    """Paths of the leaves of a tree that hold an infinite number or none."""
    return [plain(name) for name in checksums_lib.not_finite(tree)]


def plain(name: str) -> str:
    """``optimizer/0/mu`` for ``['optimizer'][0].mu``."""
    return "/".join(a or b for a, b in re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", name))


def _named(tree: Any) -> dict[str, Any]:
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


def _infinite(item: str, paths: Iterable[str]) -> str:
    found = _first(list(paths), ", ")
    return f"{_NAMES[item]} not finite: {found}" if found else ""


def _first(lines: list[str], between: str, *, most: int = 3) -> str:
    more = f" (and {len(lines) - most} more)" if len(lines) > most else ""
    return between.join(lines[:most]) + more
