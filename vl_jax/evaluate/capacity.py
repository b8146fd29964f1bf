"""What a trained model loses where its experts have fewer slots than in training, or gains with more."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.evaluate.interventions import target_losses
from vl_jax.layout import NO_COLLECTIONS, Layout, put_batch
from vl_jax.moe.config import CapacityConfig
from vl_jax.moe.specialise.replacing import with_layers
from vl_jax.moe.stacks import RoutingState

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)  # slots of an expert over the mean load


def capacity_curve(
    layout: Layout,
    params: Any,
    state: RoutingState,
    batches: Sequence[Batch],
    *,
    stack: str,
    factors: Sequence[float] = FACTORS,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> dict[float, float]:
    """The mean loss per target by the factor, in nats; empty where slots have no meaning for the scheme.

    Args:
      batches: on the host.
      stack: whose layers have other slots.
    """
    model, found = layout.model.config, {}
    moe = model.stacks[stack].moe
    on_device = [put_batch(batch, layout) for batch in batches]
    weights = [np.asarray(batch.loss_weights) for batch in batches]
    for factor in factors:
        try:
            limit = CapacityConfig(factor=factor, priority=moe.limit.priority)
            other = with_layers(model, {moe: dataclasses.replace(moe, limit=limit)}).build()
        except ValueError:
            return {}
        run = jax.jit(functools.partial(target_losses, model=other))
        with sharding.use_mesh(layout.mesh, layout.rules):
            losses = [np.asarray(run(params, state, b, collections=collections)) for b in on_device]
        total = sum(float(np.sum(v * w)) for v, w in zip(losses, weights, strict=True))
        found[factor] = total / sum(float(w.sum()) for w in weights)
    return found
