"""Parameters before they exist: their shapes, where each lives on the mesh, and how to create them there."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.model import VisionLanguage, VisionLanguageConfig, init_routing_state
from vl_jax.roles import Role
from vl_jax.sharding import AxisRules, Placement


@dataclasses.dataclass(frozen=True)
class Layout:
    """The model's parameters before they exist: shapes, and where each leaf lives on the mesh."""

    model: VisionLanguage
    mesh: Mesh
    rules: AxisRules
    placements: dict[str, Placement]
    params: Any  # tree of ShapeDtypeStruct with shardings

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every parameter, by path."""
        return {path: placement.role for path, placement in self.placements.items()}

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())


def smallest_batch(config: VisionLanguageConfig, *, rows: int = 1) -> Batch:
    """A batch of two tokens a row: enough to learn the shapes of the parameters."""
    zeros, encoder = np.zeros((rows, 2), np.int32), config.encoder
    pixels = (0, 1, 1, 3) if encoder is None else (1, *encoder.pixels)
    high = None
    if config.high_resolution is not None:
        side = config.high_resolution.encoder.image_size
        high = np.zeros((rows, 1, side, side, pixels[-1]), np.float32)
    return Batch(
        tokens=zeros,
        positions=zeros,
        segment_ids=zeros + 1,
        branch_ids=zeros,
        visual_slot=zeros - 1,
        target_index=zeros,
        targets=zeros,
        loss_weights=zeros.astype(np.float32),
        tiles=np.zeros((rows, *pixels), np.uint8),
        visual_index=zeros - 1,
        visual_start=zeros,
        visual_segment_ids=zeros,
        high_tiles=high,
    )


def abstract(model: VisionLanguage) -> Any:
    """Shapes and dtypes of every parameter, without sharding."""
    routing = init_routing_state(model.config)

    def init(key: jax.Array, batch: Batch) -> Any:
        return model.init(key, batch, routing, method="initialize")["params"]

    return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), smallest_batch(model.config)))


def plan_layout(model: VisionLanguage, example: Batch, mesh: Mesh, rules: AxisRules | None = None) -> Layout:
    """Shapes and placement of every parameter, without allocating any."""
    rules = rules or AxisRules()
    routing = init_routing_state(model.config)
    with sharding.use_mesh(mesh, rules):
        boxed = jax.eval_shape(
            lambda key, batch: model.init(key, batch, routing, method="initialize")["params"],
            jax.random.key(0),
            example,
        )
    placements = sharding.place(boxed, mesh, rules)
    shapes, targets = nn.meta.unbox(boxed), sharding.shardings(placements, mesh)
    params = jax.tree.map(lambda s, t: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=t), shapes, targets)
    return Layout(model, mesh, rules, placements, params)


def init_params(layout: Layout, example: Batch, seed: int) -> Any:
    """Fresh parameters, each created where it lives."""
    routing = init_routing_state(layout.model.config)

    def init(key: jax.Array, batch: Batch) -> Any:
        return nn.meta.unbox(layout.model.init(key, batch, routing, method="initialize")["params"])

    targets = jax.tree.map(lambda leaf: leaf.sharding, layout.params)
    with sharding.use_mesh(layout.mesh, layout.rules):
        return jax.jit(init, out_shardings=targets)(jax.random.key(seed), example)


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
