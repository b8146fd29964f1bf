"""What a run begins with when it begins with a checkpoint of another one: parameters by path, and the state.

    checkpoint --by path and shape--> parameters, routing state, collections
    what the checkpoint lacks, or has in another shape --> created afresh, and listed
    sparse layers with fewer experts --> grown, if that is asked for (see ``moe.specialise.growing``)
    dense layers where ours have experts --> copies, if that is asked for (see ``moe.specialise.upcycling``)

Weights in int8 become what they stand for, and adapters are merged into their weights first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.compress import quantize
from vl_jax.interop.rules import place
from vl_jax.layout import Layout, Variables, init_leaves
from vl_jax.moe import stacks
from vl_jax.moe.specialise import growing
from vl_jax.moe.specialise.growing import GrowthConfig
from vl_jax.moe.specialise.upcycling import UpcyclingConfig
from vl_jax.runtime.lazy_array import Index, LazyArray
from vl_jax.train import lora, saved
from vl_jax.train.lora import LoraConfig
from vl_jax.train.specialise import growth as growth_of
from vl_jax.train.specialise import upcycle

logger = logging.getLogger(__name__)

LoraOf = Callable[[Mapping[str, Any]], LoraConfig | None]

# What the training state of a checkpoint has of a model, beside the optimiser's.
_PARTS = ("routing", "adapters", "collections")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a checkpoint to begin with is."""

    folder: Path  # as it was given
    checkpoints: Path
    step: int | None  # None: the newest


def find(folder: Path) -> Origin | None:
    """The checkpoint that a folder stands for: that of a run, of its checkpoints, or of one of them.

    None if it is something else, such as a published checkpoint.
    """
    if (folder / CHECKPOINTS).is_dir():
        return Origin(folder, folder / CHECKPOINTS, None)
    if folder.resolve().name.isdigit() and (folder / "params").is_dir():
        return Origin(folder, folder.resolve().parent, int(folder.resolve().name))
    if any(path.name.isdigit() and (path / "params").is_dir() for path in folder.iterdir()):
        return Origin(folder, folder, None)
    return None


def load(
    origin: Origin,
    layout: Layout,
    example: Batch,
    *,
    seed: int,
    lora_of: LoraOf,
    growth: GrowthConfig | None = None,
    upcycling: UpcyclingConfig | None = None,
) -> Variables:
    """Parameters, routing state and collections of a checkpoint, as far as the model has a place for them.

    What is created afresh and what is left out is logged, a line for each part.

    Args:
      example: batch of the model, for what is created.
      seed: of what is created.
      growth: how experts begin that the model has more; None: sparse layers of other sizes begin afresh.
      upcycling: how experts begin where the checkpoint has dense blocks; None: afresh.
      lora_of: from the record of the checkpoint to what its adapters are; asked if it has any.

    Raises:
      ValueError: there is no sound checkpoint, or none of its parameters is one of the model's; or no sparse
        layer can grow, or no dense block become experts.
    """
    need = params_lib.flatten({"params": layout.params, **layout.collections})
    with _read(origin, layout) as (step, have, adapters, record):
        grown = {}
        if upcycling is not None:
            have = _upcycled(origin, layout, have, need, adapters, upcycling, seed)
        if growth is not None:
            known = layout.model.config.stacks
            grown = growth_of.places(known, have, need, growth, where=str(origin.folder))
        taken = {path: leaf for path, leaf in need.items() if path in have and fits(have[path], leaf)}
        if not any(path.startswith("params/") for path in taken):
            raise ValueError(_nothing_fits(origin.folder, have, need))
        values = _placed(taken, have, adapters, layout, lora_of, record)
        state, of_state = _state(layout, have, growth)
        smaller = _smaller(grown, need, have, adapters, layout, lora_of, record)
    if new := need.keys() - taken.keys():
        values |= init_leaves(layout, example, seed, new)
    if growth is not None:
        values |= growth_of.leaves(smaller, values, grown, layout, growth, seed=seed)
        have = have | {path: need[path] for path in grown}
        have |= {path: leaf for path, leaf in of_state.items() if path in have}
    count = sum(path.startswith("params/") for path in taken)
    total = len(params_lib.flatten(layout.params))
    logger.info("init: %d of %d parameters come from %s, step %d", count, total, origin.folder, step)
    for line in differences(have, need | of_state, where=str(origin.folder)):
        logger.warning("init: %s", line)
    return _variables(layout, need, values, state)


def _upcycled(
    origin: Origin,
    layout: Layout,
    have: dict[str, Any],
    need: Mapping[str, Any],
    adapters: Mapping[str, LazyArray],
    config: UpcyclingConfig,
    seed: int,
) -> dict[str, Any]:
    """The leaves of a dense checkpoint as the model has them."""
    if adapters:
        raise ValueError(
            f"config.init_dense: the adapters of {origin.folder} are not merged; give a checkpoint at "
            "the end of a stage"
        )
    known = layout.model.config.stacks
    return upcycle.leaves(known, have, need, config, seed=seed, where=str(origin.folder))


def _smaller(
    grown: Collection[str],
    need: Mapping[str, Any],
    have: Mapping[str, LazyArray],
    adapters: Mapping[str, LazyArray],
    layout: Layout,
    lora_of: LoraOf,
    record: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """The leaves of a checkpoint that are to grow, whole on every device, adapters merged."""

    def whole(path: str) -> jax.Array:
        array = _cast(have[path], need[path].dtype)
        return jax.device_put(array[(slice(None),) * len(array.shape)], layout.replicated)

    own = {f"{path.removeprefix('params/')}/{factor}" for path in grown for factor in ("a", "b")}
    values, kept = {path: whole(path) for path in grown}, {k: v for k, v in adapters.items() if k in own}
    return values | (_merged(values, kept, layout, lora_of(record)) if kept else {})


def load_part(origin: Origin, layout: Layout, *, lora_of: LoraOf) -> tuple[Variables, int]:
    """What a checkpoint has of a model that is a part of its own, and its step; nothing else is read.

    Args:
      lora_of: as for ``load``.

    Raises:
      ValueError: there is no sound checkpoint, or it lacks something of the model.
    """
    need = params_lib.flatten({"params": layout.params, **layout.collections})

    def chosen(path: str) -> bool:
        weight, _, part = path.rpartition("/")
        return f"params/{path}" in need or (part in quantize.PARTS and f"params/{weight}" in need)

    with _read(origin, layout, chosen=chosen) as read:
        step, have, adapters, record = read
        lacking = [path for path, leaf in need.items() if path not in have or not fits(have[path], leaf)]
        if lacking:
            raise ValueError(
                f"{origin.folder}: its checkpoint has no {_shown(lacking[0])} that fits the model"
            )
        values = _placed(need, have, adapters, layout, lora_of, record)
        state, _ = _state(layout, have, None)
    return _variables(layout, need, values, state), step


@contextlib.contextmanager
def _read(
    origin: Origin, layout: Layout, *, chosen: Callable[[str], bool] = lambda path: True
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Step, leaves by path, adapters by path and record of a checkpoint; leaves are read while it is open."""
    checkpointer = Checkpointer(origin.checkpoints, lazy=True, read_only=True)
    try:
        found = checkpointer.restore_stored(_PARTS, only=origin.step, chosen=chosen)
        if found is None:
            raise ValueError(f"config.init={origin.folder}: holds no checkpoint")
        step, params, training, record = found
        routing = saved.by_stack(layout, training.get("routing", {}), record)
        tree = {"params": params, **training.get("collections", {}), "routing": routing}
        have = quantize.whole_when_read(params_lib.flatten(tree))
        yield step, have, params_lib.flatten(training.get("adapters", {})), record
    finally:
        checkpointer.close()


def _placed(
    need: Mapping[str, Any],
    have: Mapping[str, LazyArray],
    adapters: Mapping[str, LazyArray],
    layout: Layout,
    lora_of: LoraOf,
    record: Mapping[str, Any],
) -> dict[str, jax.Array]:
    """Leaves of a checkpoint where the model has them, adapters merged."""
    values = {path: place(_cast(have[path], leaf.dtype), leaf) for path, leaf in need.items()}
    return values | (_merged(values, adapters, layout, lora_of(record)) if adapters else {})


def _variables(
    layout: Layout, need: Mapping[str, Any], values: Mapping[str, jax.Array], state: dict[str, Any]
) -> Variables:
    tree = params_lib.unflatten({path: values[path] for path in need})
    return Variables(tree["params"], state, {name: tree[name] for name in layout.collections})


def fits(have: Any, need: Any) -> bool:
    """Whether a stored leaf can take the place of one of the model's."""
    return tuple(have.shape) == tuple(need.shape)


def differences(have: Mapping[str, Any], need: Mapping[str, Any], *, where: str) -> list[str]:
    """What a checkpoint lacks, has in another shape, or has too much, one line a part.

    Args:
      have, need: leaves by path; below ``params/`` are the parameters.
      where: name of the checkpoint.
    """
    lines = []
    for part, paths in _parts(need.keys() - have.keys(), have.keys() & need.keys()).items():
        size = sum(int(np.prod(need[path].shape)) for path in paths)
        lines.append(f"{part} is not in {where}: {len(paths)} leaves ({size:,} numbers) begin afresh")
    for path in sorted(path for path in have.keys() & need.keys() if not fits(have[path], need[path])):
        shapes = tuple(have[path].shape), tuple(need[path].shape)
        lines.append(f"{_shown(path)} is {shapes[0]} in {where} and {shapes[1]} here: it begins afresh")
    for part, paths in _parts(have.keys() - need.keys(), need).items():
        lines.append(f"{part} of {where} has no place here: {len(paths)} leaves are left out")
    return lines


def _parts(paths: Iterable[str], others: Collection[str]) -> dict[str, list[str]]:
    """Paths by the shortest of their beginnings that no other path has, but for the first name."""
    beginnings = {other[:at] for other in others for at, c in enumerate(f"{other}/") if c == "/"}
    parts: dict[str, list[str]] = {}
    for path in sorted(paths):
        ends = [at for at, c in enumerate(f"{path}/") if c == "/"][1:] or [len(path)]
        part = next((path[:end] for end in ends if path[:end] not in beginnings), path)
        parts.setdefault(_shown(part), []).append(path)
    return parts


def _shown(path: str) -> str:
    return path.removeprefix("params/")


def _nothing_fits(folder: Path, have: Mapping[str, Any], need: Mapping[str, Any]) -> str:
    first = [next(_shown(p) for p in tree if p.startswith("params/")) for tree in (have, need)]
    return (
        f"config.init={folder}: none of its parameters has path and shape of one of the model's; it has "
        f"{first[0]}, the model {first[1]}"
    )


def _cast(array: LazyArray, dtype: Any) -> LazyArray:
    def read(index: Index) -> np.ndarray:
        return array[index].astype(dtype, copy=False)

    return LazyArray(array.shape, np.dtype(dtype), read)


def _merged(
    values: Mapping[str, jax.Array],
    adapters: Mapping[str, LazyArray],
    layout: Layout,
    config: LoraConfig | None,
) -> dict[str, jax.Array]:
    """The weights that have adapters, with these added."""
    assert config is not None
    merged = {}
    for path in sorted({path.rpartition("/")[0] for path in adapters}):
        weight = values.get(f"params/{path}")
        if weight is None:  # the weight has no place here, which is told
            continue
        pair = [adapters[f"{path}/{name}"] for name in ("a", "b")]
        a, b = (jax.device_put(x[(slice(None),) * len(x.shape)], layout.replicated) for x in pair)
        tree = params_lib.unflatten({path: weight}), params_lib.unflatten({f"{path}/a": a, f"{path}/b": b})
        add = functools.partial(lora.merge, scale=config.scale, roles=layout.roles, only=config.only)
        targets = params_lib.unflatten({path: weight.sharding})
        sums = params_lib.flatten(jax.jit(add, out_shardings=targets)(*tree))
        merged[f"params/{path}"] = sums[path]
    return merged


def _state(
    layout: Layout, have: Mapping[str, LazyArray], growth: GrowthConfig | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The routing state by stack, and all of its leaves by path; what does not fit is as at the beginning."""
    known = layout.model.config.stacks
    first = stacks.init_state(known)

    def value(path: str, leaf: Any) -> Any:
        if path not in have:
            return leaf
        stored = _cast(have[path], leaf.dtype)[(slice(None),) * len(have[path].shape)]
        if fits(stored, leaf):
            return stored
        stack = known[path.split("/")[1]]
        if growth is None or stored.ndim != leaf.ndim or leaf.shape[-1] != stack.moe.num_experts:
            return leaf
        name = path.rpartition("/")[2]
        return growing.grow_state({name: stored}, {name: leaf}, stack, growth)[name]

    state = {
        name: params_lib.map_paths(lambda path, leaf, at=f"routing/{name}": value(f"{at}/{path}", leaf), of)
        for name, of in first.items()
    }
    return state, params_lib.flatten({"routing": first})
