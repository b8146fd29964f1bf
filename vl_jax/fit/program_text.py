"""What a compiled program says of itself: collectives with their bytes, and how often loops run them.

    collectives(text, mesh) -> [Collective(kind, bytes, axes, times), ...]

The text is XLA's after optimisation. A loop's body is written once; how often it runs is what the condition
compares its counter with. Which devices talk says which axes of the mesh a collective goes along.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "ragged-all-to-all",
    "all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# The TPU compiler's fusion of a sum with the slice of it that a device keeps: no device has the whole sum.
_SCATTERED = "all-reduce-scatter"
Groups = frozenset[frozenset[int]]
_BITS = {"pred": 8, "bf16": 16, "f16": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMES = r"\{?%?([\w.\-]+(?:, *%?[\w.\-]+)*)\}?"
_CALLED = re.compile(r"(?:to_apply|calls|branch_computations|called_computations)=" + _NAMES)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program, as often as the program runs it."""

    kind: str
    size: int  # bytes of the result on one device
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  # of a scattered sum those before it is cut
    axes: tuple[str, ...]  # of the mesh that it goes along; empty where that is not to be told
    times: int  # how often a step runs it; 0: not to be told
    name: str  # where it comes from in the model, as XLA carries it


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of every computation, by its name; the first of the dictionary is the entry's."""
    found: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = found.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif lines is not None and line.startswith(" "):
            lines.append(line.strip())
    return {entry: found.pop(entry), **found} if entry else found


def runs(program: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How often a step runs every computation; a loop whose count is not to be told counts once."""
    entry = next(iter(program), "")
    times: dict[str, int] = {}

    def walk(name: str, often: int) -> None:
        times[name] = times.get(name, 0) + often
        for line in program.get(name, ()):
            loop = _WHILE.search(line)
            if loop:
                walk(loop[2], often * _trips(program.get(loop[1], ()), line))
                continue
            for called in _CALLED.findall(line):
                for child in re.split(r", *%?", called):
                    if child in program:
                        walk(child, often)

    if entry:
        walk(entry, 1)
    return times


def _trips(condition: Iterable[str], line: str) -> int:
    """How often a loop runs: as noted, or the largest number that its condition compares with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    numbers = [int(n) for text in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)]
    return max(numbers, default=1)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a program; one that is spread over several fusions counts once."""
    program = computations(text)
    often, groups_of = runs(program), _groups_by_axes(mesh)
    found, seen = [], set[tuple[Any, ...]]()
    for name, lines in program.items():
        for line in lines:
            given = received(line)
            if given is None or name not in often:
                continue
            kind, arrays = given
            channel = re.search(r"channel_id=\d+", line)
            # All that ``shard_map`` asks for may have one channel: a collective is told by its arrays too.
            known = (channel and channel[0], kind, *arrays)
            if channel and known in seen:
                continue
            seen.add(known)
            size = size_of(arrays)
            if not size:
                continue
            axes = _axes(line, groups_of, mesh)
            if kind == "all-reduce" and name.startswith(_SCATTERED):
                kind, size = "reduce-scatter", size // math.prod(mesh.shape[axis] for axis in axes)
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind,
                    size,
                    tuple(sorted({dtype for dtype, _ in arrays})),
                    tuple(shape for _, shape in arrays),
                    axes,
                    often[name],
                    origin[1] if origin else "",
                )
            )
    return found


def received(line: str) -> tuple[str, list[tuple[str, tuple[int, ...]]]] | None:
    """The kind of an instruction's collective, and type and shape of what it gives; None: it is none."""
    match = _COLLECTIVE.search(line)
    if not match:
        return None
    arrays = [(k, tuple(int(n) for n in sizes.split(",") if n)) for k, sizes in _ARRAY.findall(match[1])]
    if match[3] and match[2] in ("collective-permute", "all-gather", "ragged-all-to-all"):
        arrays = arrays[1:2]  # started, it has its operand before its result (or what that is written to)
    return match[2], arrays


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Type and shape of everything that an instruction of a program gives."""
    found = set()
    for match in re.finditer(r"^ +(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ", text, re.MULTILINE):
        for kind, sizes in _ARRAY.findall(match[1]):
            found.add((kind, tuple(int(n) for n in sizes.split(",") if n)))
    return found


def size_of(arrays: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of arrays by type and shape."""
    return sum(math.ceil(_bits(dtype) * math.prod(shape) / 8) for dtype, shape in arrays)


def _bits(kind: str) -> int:
    return _BITS.get(kind) or int(re.match(r"[a-z]+(\d+)", kind)[1])  # pyright: ignore[reportOptionalSubscript]


def _groups_by_axes(mesh: Mesh) -> dict[Groups, tuple[str, ...]]:
    """The groups of devices, by their places in the mesh, that each set of axes makes; smaller sets win."""
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    found: dict[Groups, tuple[str, ...]] = {}
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            inner = [list(mesh.shape).index(axis) for axis in chosen]
            outer = [i for i in range(places.ndim) if i not in inner]
            length = math.prod(places.shape[i] for i in inner)
            rows = places.transpose(*outer, *inner).reshape(-1, length)
            found.setdefault(frozenset(frozenset(map(int, row)) for row in rows), chosen)
    return found


def _axes(line: str, groups_of: Mapping[Groups, tuple[str, ...]], mesh: Mesh) -> tuple[str, ...]:
    """The axes that a collective's groups, or pairs of sender and receiver, go along."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    shape = tuple(mesh.shape.values())
    if pairs:
        ends = [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)", pairs[0])]
        places = [(np.unravel_index(a, shape), np.unravel_index(b, shape)) for a, b in ends]
        moved = {axis for a, b in places for axis, x, y in zip(mesh.shape, a, b, strict=True) if x != y}
        return tuple(axis for axis in mesh.shape if axis in moved)
    groups = _groups(line)
    return groups_of.get(groups, ()) if groups else tuple(a for a, size in mesh.shape.items() if size > 1)


def _groups(line: str) -> Groups | None:
    """The groups of a collective, in the three ways that XLA writes them; None: all devices."""
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if listed:
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return frozenset(frozenset(map(int, group.split(","))) for group in groups)
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        rows, sizes = ([int(n) for n in counted[i].split(",")] for i in (1, 2))
        order = [int(n) for n in counted[3].split(",")] if counted[3] else list(range(len(sizes)))
        places = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(rows)
        return frozenset(frozenset(map(int, row)) for row in places)
    named = re.search(r"replica_groups=(?:\w+)?\[?(.*?)\]? *\{([^}]*)\}", line)
    if named and "=" in named[1]:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        chosen = re.findall(r"'(\w+)'", named[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        inner = [list(sizes).index(axis) for axis in chosen]
        outer = [i for i in range(places.ndim) if i not in inner]
        rows = places.transpose(*outer, *inner).reshape(-1, math.prod(places.shape[i] for i in inner))
        return frozenset(frozenset(map(int, row)) for row in rows)
    return None
