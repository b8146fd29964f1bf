"""Parameter trees: paths, counts, masks by regular expression, and splitting a tree in two.

A leaf is addressed by its path, e.g. ``language/moe_layers/attention/query/kernel``. Masks select leaves by
patterns that must match the *whole* path; ``language/.*`` is every leaf below ``language``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

Tree = Any

# A leaf of a pytree record: an array, or whatever a tree transformation puts in its place (a shape, a
# sharding). The comment beside each field gives dtype and shape; functions check them.
Leaf = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """Flattens nested mappings into ``{path: leaf}``, paths joined by ``/``."""
    flat: dict[str, Any] = {}

    def visit(node: Any, prefix: tuple[str, ...]) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                visit(value, (*prefix, key))
        else:
            flat["/".join(prefix)] = node

    visit(tree, ())
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Applies ``function(path, leaf)`` to every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def select(tree: Tree, patterns: Sequence[str]) -> set[str]:
    """The paths matched in full by any of the patterns.

    Raises:
      ValueError: a pattern is not a regular expression, or matches no path of the tree.
    """
    paths = list(flatten(tree))
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        matched = {p for p in paths if expression.fullmatch(p)}
        if not matched:
            tops = sorted({p.split("/")[0] for p in paths})
            raise ValueError(f"pattern {pattern!r} matches no parameter; top-level names: {', '.join(tops)}")
        chosen |= matched
    return chosen


def split(tree: Tree, paths: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into (leaves whose path is in ``paths``, all others)."""
    flat = flatten(tree)
    chosen = {p: leaf for p, leaf in flat.items() if p in paths}
    return unflatten(chosen), unflatten({p: leaf for p, leaf in flat.items() if p not in paths})


def merge(first: Tree, second: Tree) -> dict[str, Any]:
    """The union of two trees with disjoint leaves, as ``split`` gave them."""
    return unflatten({**flatten(first), **flatten(second)})


def count(tree: Tree) -> int:
    """The number of parameters (not leaves)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
