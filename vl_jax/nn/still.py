"""What a model holds beside its parameters, and keeps as it is although other such things move.

Running statistics move as a model trains. Those of a module that does not train must not, nor any in an
evaluation: a tree of marks says which, and goes to the model as a collection of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from vl_jax import params as params_lib

# The collection of marks: it has, by module and name, the leaves that stay. A module that finds its leaf here
# takes it as it is, and does not look at the batch.
STILL = "still"


def resting(collections: Mapping[str, Any], rests: Callable[[str], bool]) -> dict[str, Any]:
    """The collections, and the marks of those leaves whose path in their collection ``rests``."""
    found = {
        path: leaf
        for tree in collections.values()
        for path, leaf in params_lib.flatten(tree).items()
        if rests(path)
    }
    return {**collections, STILL: params_lib.unflatten(found)} if found else dict(collections)


def moving(collections: Mapping[str, Any]) -> list[str]:
    """The names of the collections of which something moves."""
    still: Collection[str] = params_lib.flatten(collections.get(STILL, {})).keys()
    return [
        name
        for name, tree in collections.items()
        if name != STILL and any(path not in still for path in params_lib.flatten(tree))
    ]
