"""A model's config with other sparse layers in the place of its own, wherever it has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vl_jax.moe.routing import MoEConfig


def with_layers(config: Any, others: Mapping[MoEConfig, MoEConfig]) -> Any:
    """The config, with every layer that is named replaced by another.

    Args:
      config: of anything: a model, an experiment.
    """
    if isinstance(config, MoEConfig):
        return others.get(config, config)
    if isinstance(config, tuple):
        return tuple(with_layers(item, others) for item in config)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        old = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
        new = {name: with_layers(item, others) for name, item in old.items()}
        if any(new[name] is not old[name] and new[name] != old[name] for name in old):
            return dataclasses.replace(config, **new)
    return config
