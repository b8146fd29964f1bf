"""The leaves of a dense checkpoint as a model with experts has them; see ``moe.specialise.upcycling``.

    layers 0 1 2 of a run of dense ones --by number--> layer 0 of a dense run, 1 and 2 of a sparse one
    their blocks                        --copies-----> experts; a new router; shared experts that say nothing

Nothing is read before it is used, and then one layer of one leaf at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vl_jax.moe.specialise import upcycling
from vl_jax.moe.specialise.upcycling import Copies, UpcyclingConfig
from vl_jax.moe.stacks import Stack, Stacks
from vl_jax.runtime.lazy_array import Index, LazyArray

_WHERE = "config.init_dense"
# Of a dense block, the leaf that each leaf of an expert is cut out of.
_FORMS = (
    {"w_in": "mlp/w_in", "b_in": "mlp/b_in", "w_out": "mlp/w_out", "b_out": "mlp/b_out"},
    {"w_in": "fc1/kernel", "b_in": "fc1/bias", "w_out": "fc2/kernel", "b_out": "fc2/bias"},
)
Tree = Mapping[str, Any]  # leaves by path; below ``params/`` are the parameters
Layer = tuple[LazyArray, int]  # a leaf of several layers, and which of them


@dataclasses.dataclass(frozen=True)
class _Run:
    """Some layers of one kind, whose leaves have them along their first axis."""

    at: str  # its path
    leaves: dict[str, Any]  # below it, by path
    experts: str  # name of the module of its experts; empty: it is dense

    @property
    def form(self) -> dict[str, str] | None:
        """The names of the leaves of its dense blocks."""
        return next((form for form in _FORMS if form["w_in"] in self.leaves), None)

    @property
    def common(self) -> frozenset[str]:
        """The leaves beside its blocks or experts."""
        own = set((self.form or {}).values())
        beside = (leaf for leaf in self.leaves if not self.experts or leaf.split("/")[0] != self.experts)
        return frozenset(leaf for leaf in beside if leaf not in own)

    @property
    def length(self) -> int:
        return next(iter(self.leaves.values())).shape[0]


def leaves(
    stacks: Stacks, have: Tree, need: Tree, config: UpcyclingConfig, *, seed: int, where: str
) -> dict[str, Any]:
    """The leaves of a checkpoint, those of dense layers in the places of the model's.

    Args:
      stacks: of the model.
      have, need: leaves of the checkpoint and of the model.
      seed: of noise and routers.
      where: name of the checkpoint.

    Raises:
      ValueError: no part of it is dense where the model has experts, or its blocks cannot become experts.
    """
    result, parts = dict(have), _parts(stacks, need)
    dense = {
        part: sparse
        for part, sparse in parts.items()
        if not all(f"{run.at}/{run.experts}/w_in" in have for run, *_ in sparse)
    }
    if not dense:
        raise ValueError(f"{_WHERE}: {where} has experts wherever the model has; it must be None")
    for part, sparse in dense.items():
        common = sparse[0][0].common
        ours, theirs = (_runs(tree, part, common, sparse[0][0].experts) for tree in (need, have))
        _check(part, ours, theirs, where)
        layers = [(run, i) for run in theirs for i in range(run.length)]
        for run in theirs:
            for leaf in run.leaves:
                del result[f"{run.at}/{leaf}"]
        numbers = _numbers(ours, sparse)
        for run in ours:
            own = [layers[number] for number in numbers[run.at]]
            names = run.common | (set() if run.experts else set((run.form or {}).values()) & set(run.leaves))
            for name in names:
                result[f"{run.at}/{name}"] = _stacked(
                    [(of.leaves[name], i) for of, i in own if name in of.leaves]
                )
            if run.experts:
                stack = next(stack for r, stack, _ in sparse if r.at == run.at)
                result |= _experts(run, own, stack, config, seed=seed)
    return result


def _parts(stacks: Stacks, need: Tree) -> dict[str, list[tuple[_Run, Stack, tuple[int, ...]]]]:
    """By the path of a part its sparse runs, their stack, and the numbers of their layers."""
    found: dict[str, list[tuple[_Run, Stack, tuple[int, ...]]]] = {}
    for stack in stacks.values():
        numbers = iter(stack.layers)
        for path in stack.runs:
            run = _run(need, "/".join(("params", *path[:-1])), path[-1])
            own = tuple(itertools.islice(numbers, run.length))
            found.setdefault(run.at.rpartition("/")[0], []).append((run, stack, own))
    return found


def _run(tree: Tree, at: str, experts: str) -> _Run:
    below = {path[len(at) + 1 :]: leaf for path, leaf in tree.items() if path.startswith(at + "/")}
    return _Run(at, below, experts if f"{experts}/w_in" in below else "")


def _runs(tree: Tree, part: str, common: frozenset[str], experts: str) -> list[_Run]:
    """The runs of layers of a part, by name: those with the same leaves beside blocks and experts."""
    names = {path[len(part) + 1 :].split("/")[0] for path in tree if path.startswith(part + "/")}
    runs = [_run(tree, f"{part}/{name}", experts) for name in names]
    runs = [run for run in runs if (run.form or run.experts) and run.common == common]
    return sorted(runs, key=lambda run: [int(n) for n in re.findall(r"\d+", run.at[len(part) :])])


def _check(part: str, ours: list[_Run], theirs: list[_Run], where: str) -> None:
    name = part.removeprefix("params/")
    if not theirs or any(run.experts for run in theirs):
        what = "some layers with experts" if theirs else "no layers like those of the model"
        raise ValueError(f"{_WHERE}: {name} of {where} has {what}; all of them must be dense")
    count, needed = (sum(run.length for run in runs) for runs in (theirs, ours))
    if count != needed:
        raise ValueError(f"{_WHERE}: {name} has {count} layers in {where} and {needed} in the model")


def _numbers(
    ours: list[_Run], sparse: Iterable[tuple[_Run, Stack, tuple[int, ...]]]
) -> dict[str, tuple[int, ...]]:
    """The numbers of the layers of every run of the model: dense ones have those that are left, in order."""
    found = {run.at: numbers for run, _, numbers in sparse}
    taken = {number for numbers in found.values() for number in numbers}
    left = (number for number in range(sum(run.length for run in ours)) if number not in taken)
    return found | {run.at: tuple(itertools.islice(left, run.length)) for run in ours if not run.experts}


def _stacked(layers: list[Layer]) -> LazyArray:
    """Layers of several leaves as one."""
    first = layers[0][0]

    def read(index: Index) -> np.ndarray:
        return np.concatenate([leaf[(slice(i, i + 1), *index[1:])] for leaf, i in layers[index[0]]])

    return LazyArray((len(layers), *first.shape[1:]), first.dtype, read)


def _experts(
    run: _Run, layers: list[tuple[_Run, int]], stack: Stack, config: UpcyclingConfig, *, seed: int
) -> dict[str, LazyArray]:
    """The leaves of the experts of a run, made of the dense blocks of its layers."""
    moe, form, at = stack.moe, layers[0][0].form, f"{run.at}/{run.experts}"
    assert form is not None
    biased = form["b_out"] in layers[0][0].leaves
    block = layers[0][0].leaves[form["w_out"]].shape[-2:]
    try:
        if biased and not moe.expert_bias:
            raise ValueError("moe.expert_bias=False: the blocks have biases, and copies must have them too")
        if stack.dense is not None and stack.dense != moe.activation:
            raise ValueError(f"moe.activation={moe.activation} must be that of the blocks, {stack.dense}")
        cut = upcycling.copies(moe, width=block[1], mlp_dim=block[0])
    except ValueError as error:
        raise ValueError(f"{_WHERE}: {at.removeprefix('params/')}: {error}") from None
    number, made = zlib.crc32(at.encode()), {}
    for name in ("w_in", "w_out", *(("b_in", "b_out") if biased else ())):
        source = [(of.leaves[form[name]], i) for of, i in layers]
        shape = run.leaves[f"{run.experts}/{name}"].shape
        made[f"{at}/{name}"] = _copied(name, shape, source, cut, config.noise, (seed, number))
    if cut.router is not None:
        made[f"{at}/router"] = _router(run.leaves[f"{run.experts}/router"].shape, cut, (seed, number))
    if (shared := run.leaves.get(f"{run.experts}/shared/w_out")) is not None:
        made[f"{at}/shared/w_out"] = LazyArray.of(np.broadcast_to(np.float32(0), shared.shape))
    return made


def _copied(
    name: str,
    shape: tuple[int, ...],
    source: list[Layer],
    cut: Copies,
    noise: float,
    seeds: tuple[int, int],
) -> LazyArray:
    """One leaf of the experts [L E ...], each with its piece of the block of its layer.

    Args:
      noise: over the standard deviation of the block's numbers; for matrices.
      seeds: of the noise, besides layer and expert.
    """
    axis = {"w_out": 0, "b_out": None}.get(name, -1)
    factor = {"w_out": 1 / cut.gate, "b_out": 1 / (cut.gate * cut.pieces)}.get(name, 1.0)
    noise, whole = noise * name.startswith("w_"), list(shape[2:])
    if axis is not None:
        whole[axis] *= cut.pieces

    @functools.lru_cache(maxsize=1)
    def block(layer: int) -> tuple[np.ndarray, float]:
        leaf, i = source[layer]
        every = (slice(None),) * (len(leaf.shape) - 1)
        value = factor * np.asarray(leaf[(slice(i, i + 1), *every)], np.float32).reshape(whole)
        return value, noise * float(value.std())

    def expert(layer: int, number: int) -> np.ndarray:
        value, deviation = block(layer)
        if axis is not None:
            value = np.split(value, cut.pieces, axis)[number % cut.pieces]
        if deviation:
            random = np.random.default_rng((*seeds, zlib.crc32(name.encode()), layer, number))
            value = value + np.float32(deviation) * random.standard_normal(value.shape, np.float32)
        return value

    def read(index: Index) -> np.ndarray:
        layers, experts = range(shape[0])[index[0]], range(shape[1])[index[1]]
        return np.stack([np.stack([expert(i, e)[index[2:]] for e in experts]) for i in layers])

    return LazyArray(shape, np.dtype(np.float32), read)


def _router(shape: tuple[int, ...], cut: Copies, seeds: tuple[int, int]) -> LazyArray:
    """The columns of a new router [L D E]: random, and alike for the pieces of one copy."""
    _, width, columns = shape
    assert cut.router is not None
    size = np.float32(cut.router * width**-0.5)

    def layer(number: int) -> np.ndarray:
        random = np.random.default_rng((*seeds, number))
        own = size * random.standard_normal((width, columns // cut.pieces), np.float32)
        return np.repeat(own, cut.pieces, axis=1)

    def read(index: Index) -> np.ndarray:
        return np.stack([layer(i)[index[1:]] for i in range(shape[0])[index[0]]])

    return LazyArray(shape, np.dtype(np.float32), read)
