"""Rules that map the tensors of a published checkpoint onto our parameter tree, and back.

A table of rules is the whole knowledge about one family of checkpoints::

    Rule("model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", "language/{stack}/moe/w_in",
         "layer expert part f d -> layer expert d part f", parts=("gate", "up"))

Left of the arrow are the fields of the template, in order of appearance, and the axes of one source tensor;
``(n h)`` is one source axis that merges two of ours, ``1`` an axis of size one that only the source has. On
the right are the axes of our parameter. All sizes follow from the shape of our parameter, so a rule holds for
every size of the family, and each direction is the exact inverse of the other::

    plan(rules, shapes, stacks) --.--> read(plan, weights, targets)     source tensors -> our tree
                                  |--> lazily(plan, weights, targets)   the same, read when it is used
                                  '--> export(plan, tree)               our tree -> source tensors, streamed

One leaf is assembled at a time, out of views of the files: host memory peaks at the largest leaf, or, where a
sharding is asked for, at the part of it that this host's devices hold.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.interop.folder import Weights
from vl_jax.interop.safetensors import Entry, WeightsError
from vl_jax.params import Tree, flatten, unflatten
from vl_jax.runtime.lazy_array import Index, LazyArray

STACK = "{stack}"
LAYER, PART = "layer", "part"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """``Rule.axes``, parsed."""

    fields: tuple[str, ...]  # axes of ours that count source tensors
    source: tuple[
        tuple[str, ...], ...
    ]  # per axis of a source tensor, the axes of ours it merges; () is ``1``
    target: tuple[str, ...]  # the axes of our parameter

    @property
    def elementary(self) -> tuple[str, ...]:
        """The axes of one source tensor, none merged and none of size one."""
        return tuple(name for group in self.source for name in group)


def parse_axes(axes: str, fields: Sequence[str]) -> Axes:
    """Parses e.g. ``"layer (n h) d -> layer d n h"`` for a template with the given fields.

    Raises:
      ValueError: unbalanced parentheses, a name that is none, or two sides that do not have the same axes.
    """
    left, arrow, right = axes.partition("->")
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", left)
    groups = [tuple(t[1:-1].split()) if t[1:] and t[0] == "(" else (t,) for t in tokens]
    target = tuple(right.split())
    names = [name for group in groups for name in group if group != ("1",)]
    if not arrow or not all(name.isidentifier() for name in (*names, *target)):
        raise ValueError(f"axes {axes!r} must look like 'a (b c) 1 -> b a c'")
    if len(set(names)) != len(names) or sorted(names) != sorted(target):
        raise ValueError(f"axes {axes!r} must have the same axes on both sides, each once")
    if groups[: len(fields)] != [(field,) for field in fields]:
        raise ValueError(f"axes {axes!r} must begin with the fields of the source: {' '.join(fields)}")
    source = tuple(() if group == ("1",) else group for group in groups[len(fields) :])
    return Axes(tuple(fields), source, target)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight table; the file's docstring explains it."""

    source: str  # key template; {layer} and {expert} count, {part} takes the values of ``parts``
    target: str  # path of our parameter; {stack} stands for each name in ``stacks``
    axes: str
    parts: tuple[str, ...] = ()

    def __post_init__(self):
        try:
            parsed = self.parsed
        except ValueError as error:
            raise ValueError(f"rule for {self.target}: {error}") from None
        if (PART in parsed.fields) != bool(self.parts):
            raise ValueError(f"rule for {self.target}: parts={self.parts} do not go with {self.source!r}")
        if STACK in self.target and LAYER not in parsed.fields:
            raise ValueError(f"rule for {self.target}: {{stack}} needs a {{layer}} in {self.source!r}")

    @property
    def parsed(self) -> Axes:
        found = [name for _, name, _, _ in string.Formatter().parse(self.source) if name is not None]
        return parse_axes(self.axes, tuple(dict.fromkeys(found)))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours and the source tensors it consists of."""

    path: str
    shape: Shape
    axes: Axes
    template: str
    values: tuple[tuple[int | str, ...], ...]  # per field, what each position along that axis is called

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.axes.target, self.shape, strict=True))

    @property
    def source_shape(self) -> Shape:
        """The shape of each of the source tensors."""
        sizes = self.sizes
        return tuple(math.prod(sizes[name] for name in group) for group in self.axes.source)

    def sources(self, window: Mapping[str, range] | None = None) -> Iterator[tuple[dict[str, int], str]]:
        """Position along every field's axis, and key, of each source tensor (inside the window, if given)."""
        fields = self.axes.fields
        ranges = [window[f] if window else range(len(v)) for f, v in zip(fields, self.values, strict=True)]
        for positions in itertools.product(*ranges):
            names = {f: v[i] for f, v, i in zip(fields, self.values, positions, strict=True)}
            yield dict(zip(fields, positions, strict=True)), self.template.format_map(names)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which source tensors make up which leaf, and the problems, which ``read`` and ``export`` raise."""

    leaves: tuple[Leaf, ...]
    problems: tuple[str, ...]


def plan(
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    stacks: Mapping[str, Sequence[int | str]] | None = None,
) -> Plan:
    """Applies rules to a tree of the given shapes.

    Args:
      rules: A rule whose target is not in the tree does not apply.
      shapes: Path to shape, of all leaves.
      stacks: Name of each stack of layers to the numbers or names its layers have in the source, in order.
        Where a target has no ``{stack}``, ``{layer}`` counts from 0, as every other field does.
    """
    leaves: dict[str, Leaf] = {}
    problems: list[str] = []
    failed: set[str] = set()
    for rule in rules:
        named = stacks or {} if STACK in rule.target else {"": None}
        for stack, layers in named.items():
            path = rule.target.replace(STACK, stack)
            if path not in shapes:
                continue
            if path in leaves:
                problems.append(f"{path}: given by two rules, {leaves[path].template} and {rule.source}")
                continue
            try:
                leaves[path] = _leaf(rule, path, tuple(shapes[path]), layers)
            except ValueError as error:
                problems.append(f"{path}: {error}")
                failed.add(path)
    problems += [f"{p}: no rule gives this parameter" for p in shapes if p not in leaves and p not in failed]
    owners: dict[str, str] = {}
    for leaf in leaves.values():
        for _, key in leaf.sources():
            if owners.setdefault(key, leaf.path) != leaf.path:
                problems.append(f"{key}: belongs to both {owners[key]} and {leaf.path}")
    return Plan(tuple(leaves.values()), tuple(problems))


def _leaf(rule: Rule, path: str, shape: Shape, layers: Sequence[int | str] | None) -> Leaf:
    axes = rule.parsed
    if len(shape) != len(axes.target):
        raise ValueError(f"shape {shape} does not have the axes {' '.join(axes.target)} of its rule")
    sizes = dict(zip(axes.target, shape, strict=True))
    values: list[tuple[int | str, ...]] = []
    for field in axes.fields:
        given = rule.parts if field == PART else layers if field == LAYER else None
        names = tuple(range(sizes[field]) if given is None else given)
        if len(names) != sizes[field]:
            raise ValueError(f"shape {shape} has {sizes[field]} along {field!r}, the source has {names}")
        values.append(names)
    return Leaf(path, shape, axes, rule.source, tuple(values))


def read(
    plan: Plan, weights: Mapping[str, np.ndarray], targets: Tree, *, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """Our tree, read from the source tensors.

    Args:
      plan: From ``plan``, for the shapes of the targets.
      weights: Source key to array; memory-mapped arrays are read only where they are used.
      targets: Tree of ``jax.ShapeDtypeStruct``. A leaf with a sharding becomes an array so sharded, of which
        each host reads its own part. Floating dtypes are cast to the target's.
      ignored: Regular expressions; source keys they match in full may go unused.

    Raises:
      WeightsError: lists every parameter without source, source tensor without use, and wrong shape or dtype.
    """
    flat = flatten(targets)
    arrays = flatten(lazily(plan, weights, targets, ignored=ignored))
    return unflatten({path: place(array, flat[path]) for path, array in arrays.items()})


def lazily(
    plan: Plan, weights: Mapping[str, np.ndarray], targets: Tree, *, ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """The tree that ``read`` gives, of lazy arrays: any part is assembled when it is asked for.

    Raises:
      WeightsError: as ``read`` does.
    """
    flat = flatten(targets)
    problems = [*plan.problems, *_mismatches(plan, weights, flat, ignored)]
    if problems:
        raise WeightsError(f"weights do not fit, {len(problems)} problems:\n" + "\n".join(problems))

    def array(leaf: Leaf) -> LazyArray:
        dtype = np.dtype(flat[leaf.path].dtype)
        return LazyArray(leaf.shape, dtype, lambda index: _assemble(leaf, weights, index, dtype))

    return unflatten({leaf.path: array(leaf) for leaf in plan.leaves})


def _mismatches(
    plan: Plan, weights: Mapping[str, np.ndarray], targets: Mapping[str, Any], ignored: Sequence[str]
) -> Iterator[str]:
    """What keeps ``read`` from reading, one line each."""
    used: set[str] = set()
    # Of a folder what is known without reading; a tensor may have to be computed.
    known: Mapping[str, Any] = weights.entries if isinstance(weights, Weights) else weights
    made = weights.made if isinstance(weights, Weights) else ()
    for leaf in plan.leaves:
        target = targets.get(leaf.path)
        if target is None or tuple(target.shape) != leaf.shape:
            yield f"{leaf.path}: planned with shape {leaf.shape}, target is {target}"
            continue
        for _, key in leaf.sources():
            used.add(key)
            if key not in known:
                yield f"{leaf.path}: source {key} is missing"
                continue
            found, shape, dtype = known[key], leaf.source_shape, np.dtype(target.dtype)
            if tuple(found.shape) != shape:
                how = " (quantised; as numbers)" if key in made else ""
                yield f"{leaf.path}: source {key}{how} has shape {tuple(found.shape)}, expected {shape}"
            if not _castable(found.dtype, dtype):
                yield f"{leaf.path}: source {key} has dtype {found.dtype}, expected {dtype}"
    skip = [re.compile(pattern) for pattern in ignored]
    for key in known:
        if key not in used and not any(pattern.fullmatch(key) for pattern in skip):
            yield f"{key}: no rule uses this source tensor"


def _castable(source: Any, target: Any) -> bool:
    if jnp.issubdtype(source, jnp.floating) and jnp.issubdtype(target, jnp.floating):
        return np.can_cast(source, target, "unsafe")
    return source == target


def place(array: LazyArray, target: Any) -> jax.Array:
    """One leaf on its devices. Waits for the copy: host memory then never holds two leaves."""
    if target.sharding is None:
        return jax.device_put(array[(slice(None),) * len(array.shape)]).block_until_ready()
    # Devices that hold the same part share one copy of it.
    parts: dict[Shape, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(
            bound for s, size in zip(index, array.shape, strict=True) for bound in s.indices(size)[:2]
        )
        if bounds not in parts:
            parts[bounds] = array[index]
        return parts[bounds]

    placed = jax.make_array_from_callback(array.shape, target.sharding, part, dtype=array.dtype)
    return placed.block_until_ready()


def _assemble(leaf: Leaf, weights: Mapping[str, np.ndarray], index: Index, dtype: np.dtype) -> np.ndarray:
    """The part of a leaf that ``index`` selects, copied out of views of the source tensors."""
    axes, sizes = leaf.axes, leaf.sizes
    window = {name: range(*s.indices(sizes[name])) for name, s in zip(axes.target, index, strict=True)}
    result = np.empty([len(window[name]) for name in axes.target], dtype)
    elementary = axes.elementary
    order = [elementary.index(name) for name in axes.target if name not in axes.fields]
    inside = tuple(slice(window[name].start, window[name].stop) for name in elementary)
    for positions, key in leaf.sources(window):
        tensor = weights[key].reshape([sizes[name] for name in elementary])
        # The ellipsis keeps a scalar an array.
        result[_within(positions, window, axes)] = tensor[(..., *inside)].transpose(order)
    return result


def layout(plan: Plan, tree: Tree, *, dtypes: Mapping[str, Any] | None = None) -> dict[str, Entry]:
    """Shape and dtype of every tensor ``export`` will give, in its order.

    Args:
      plan: From ``plan``, for the shapes of the tree.
      tree: Arrays, or anything with a dtype.
      dtypes: Dtype of source keys that are not written in the dtype of the leaf they come from.
    """
    flat, dtypes = flatten(tree), dtypes or {}
    return {
        key: Entry(leaf.source_shape, np.dtype(dtypes.get(key, flat[leaf.path].dtype)))
        for leaf in plan.leaves
        for _, key in leaf.sources()
    }


def export(
    plan: Plan, tree: Tree, *, dtypes: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The source tensors of our tree, one after the other: the exact inverse of ``read``.

    Leaves are fetched to the host piece by piece; this process must be able to address all of them.

    Raises:
      WeightsError: lists every leaf that has no rule or does not fit its rule.
    """
    flat, dtypes = flatten(tree), dtypes or {}
    planned = {leaf.path: leaf.shape for leaf in plan.leaves}
    problems = list(plan.problems)
    for path in flat.keys() | planned.keys():
        shape = tuple(flat[path].shape) if path in flat else None
        if not plan.problems and shape != planned.get(path):
            problems.append(f"{path}: planned with shape {planned.get(path)}, the tree has {shape}")
    if problems:
        raise WeightsError(f"tree does not fit, {len(problems)} problems:\n" + "\n".join(sorted(problems)))
    return itertools.chain.from_iterable(_split(leaf, flat[leaf.path], dtypes) for leaf in plan.leaves)


def _split(leaf: Leaf, array: Any, dtypes: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The source tensors of one leaf."""
    axes = leaf.axes
    left = [name for name in axes.target if name not in axes.fields]
    order = [left.index(name) for name in axes.elementary]
    for window, block in _blocks(leaf, array):
        for positions, key in leaf.sources(window):
            tensor = block[(*_within(positions, window, axes), ...)].transpose(order)
            tensor = tensor.reshape(leaf.source_shape)
            yield key, tensor.astype(dtypes.get(key, block.dtype), copy=False)


def _blocks(leaf: Leaf, array: Any) -> Iterator[tuple[Mapping[str, range], np.ndarray]]:
    """A leaf on the host, one source tensor at a time.

    Of an array on devices every part costs the start of a program: one position along its first field then.
    """
    fields = leaf.axes.fields[:1] if isinstance(array, jax.Array) else leaf.axes.fields
    whole = {name: range(size) for name, size in leaf.sizes.items()}
    for positions in itertools.product(*(whole[field] for field in fields)):
        window = whole | {field: range(i, i + 1) for field, i in zip(fields, positions, strict=True)}
        yield window, _fetch(array, tuple(slice(r.start, r.stop) for r in window.values()))


def _fetch(array: Any, index: Index) -> np.ndarray:
    """A part of an array; of a ``jax.Array`` a copy is fetched, for it keeps its host copy while it lives."""
    if not isinstance(array, jax.Array):
        return np.asarray(array[index])
    sizes = [s.stop - s.start for s in index]
    if sizes == list(array.shape):
        return np.asarray(jnp.copy(array))
    return np.asarray(jax.lax.dynamic_slice(array, [s.start for s in index], sizes))


def _within(positions: Mapping[str, int], window: Mapping[str, range], axes: Axes) -> tuple[int | slice, ...]:
    """Index of one source tensor in the part of a leaf that the window cuts out."""
    return tuple(positions[n] - window[n].start if n in positions else slice(None) for n in axes.target)
