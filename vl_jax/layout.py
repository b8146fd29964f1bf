"""Parameters before they exist: their shapes, where each lives on the mesh, and how to create them there.

A model may hold collections besides, such as the running statistics of batch normalisation: what a step
changes without a gradient. They are whole on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.moe import stacks
from vl_jax.moe.stacks import RoutingState, Stacks
from vl_jax.roles import Role
from vl_jax.sharding import AxisRules, Placement


@runtime_checkable
class ModelConfig(Protocol):
    """What the config of a model has to have.

    Its module takes ``(batch, routing_state)`` and holds the config as ``config``. Its method ``initialize``,
    of the same arguments, touches every parameter. What it returns has ``routed``: what the sparse layers
    returned, by stack.
    """

    @property
    def stacks(self) -> Stacks:
        """The sparse layers, by the part of the model they are in; the main part first."""
        ...

    def spec(self) -> ModelSpec:
        """What the data side must know of the model."""
        ...

    def check_data(self, data: DataConfig) -> None:
        """Refuses data that is not for this model.

        Raises:
          ValueError: names both sides.
        """
        ...

    def build(self) -> nn.Module:
        """The module."""
        ...

    def smallest_batch(self, rows: int) -> Batch:
        """A host batch that is just large enough to learn the shapes of the parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """The model's parameters before they exist: shapes, and where each leaf lives on the mesh."""

    model: Any  # the module that a ``ModelConfig`` builds
    mesh: Mesh
    rules: AxisRules
    placements: dict[str, Placement]
    params: Any  # tree of ShapeDtypeStruct with shardings
    collections: dict[str, Any] = dataclasses.field(default_factory=dict)  # the same of collections, by name

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every parameter, by path."""
        return {path: placement.role for path, placement in self.placements.items()}

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def created(self) -> Callable[[jax.Array, Batch], tuple[Any, dict[str, Any]]]:
        """Fresh parameters and collections of a key and a batch, each where it lives; compiled once."""
        model, routing = self.model, stacks.init_state(self.model.config.stacks)

        def init(key: jax.Array, batch: Batch) -> tuple[Any, dict[str, Any]]:
            return nn.meta.unbox(_created(model.init(key, batch, routing, method="initialize")))

        targets = jax.tree.map(lambda leaf: leaf.sharding, (self.params, self.collections))
        return jax.jit(init, out_shardings=targets)


NO_COLLECTIONS: Mapping[str, Any] = {}  # what most models have


class Variables(NamedTuple):
    """What a model computes with, and a run begins with."""

    params: Any
    routing: RoutingState
    collections: Mapping[str, Any] = NO_COLLECTIONS  # by name


def abstract(config: ModelConfig) -> Any:
    """Shapes and dtypes of every parameter, without sharding."""
    model, routing = config.build(), stacks.init_state(config.stacks)

    def init(key: jax.Array, batch: Batch) -> Any:
        return model.init(key, batch, routing, method="initialize")["params"]

    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), config.smallest_batch(1)))


def plan_layout(config: ModelConfig, example: Batch, mesh: Mesh, rules: AxisRules | None = None) -> Layout:
    """Shapes and placement of every parameter, without allocating any."""
    rules = rules or AxisRules()
    model, routing = config.build(), stacks.init_state(config.stacks)
    with sharding.use_mesh(mesh, rules):
        boxed, rest = jax.eval_shape(
            lambda key, batch: _created(model.init(key, batch, routing, method="initialize")),
            jax.eval_shape(jax.random.key, 0),  # of no device: the mesh may be of ones that are not here
            example,
        )
    placements = sharding.place(boxed, mesh, rules)
    shapes, targets = nn.meta.unbox(boxed), sharding.shardings(placements, mesh)
    params = jax.tree.map(lambda s, t: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=t), shapes, targets)
    everywhere = NamedSharding(mesh, P())
    collections = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), nn.meta.unbox(rest)
    )
    return Layout(model, mesh, rules, placements, params, collections)


def _created(variables: Any) -> tuple[Any, dict[str, Any]]:
    """What ``init`` made: the parameters, and the collections that are kept from step to step."""
    passing = ("params", "intermediates")
    return variables["params"], {name: tree for name, tree in variables.items() if name not in passing}


def init_variables(layout: Layout, example: Batch, seed: int) -> Variables:
    """Fresh parameters and collections, each created where it lives, and the initial routing state."""
    routing = stacks.init_state(layout.model.config.stacks)
    with sharding.use_mesh(layout.mesh, layout.rules):
        params, collections = layout.created(jax.random.key(seed), example)
    return Variables(params, routing, collections)


def init_leaves(layout: Layout, example: Batch, seed: int, paths: Collection[str]) -> dict[str, jax.Array]:
    """Some of the leaves of ``init_variables``, each created where it lives; the others are not computed.

    Args:
      paths: in the tree ``{"params": ..., **collections}``.
    """
    routing = stacks.init_state(layout.model.config.stacks)

    def init(key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        made = nn.meta.unbox(_created(layout.model.init(key, batch, routing, method="initialize")))
        flat = params_lib.flatten({"params": made[0], **made[1]})
        return {path: flat[path] for path in paths}

    places = params_lib.flatten({"params": layout.params, **layout.collections})
    targets = {path: places[path].sharding for path in paths}
    with sharding.use_mesh(layout.mesh, layout.rules):
        return jax.jit(init, out_shardings=targets)(jax.random.key(seed), example)


def init_params(layout: Layout, example: Batch, seed: int) -> Any:
    """Fresh parameters alone, each created where it lives."""
    return init_variables(layout, example, seed).params


def put_batch(batch: Batch, layout: Layout) -> Batch:
    """Host arrays of the global batch to the shards of the devices.

    Of the rows a process needs those of ``rows_here``; what stands in the others is not read.
    """
    target = sharding.batch_sharding(layout.mesh, layout.rules)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, target, lambda index: x[index])

    return jax.tree.map(put, batch)


def rows_here(layout: Layout, batch_size: int) -> list[int]:
    """The rows of a global batch that devices of this process hold, in order."""
    target = sharding.batch_sharding(layout.mesh, layout.rules)
    parts = target.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part is not None for row in range(batch_size)[part[0]]})
