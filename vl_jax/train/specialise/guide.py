"""Stages whose routing follows another run's: routes are replayed, or routers learn from its routers.

    stream --batch--> model of the run --routes, or logits of routers--> batch --> step

Both go into the batch (see ``moe.replay``), so the step is that of any stage.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.layout import Layout, put_batch
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.routing import scheme_of
from vl_jax.moe.specialise import replay
from vl_jax.moe.stacks import Stacks, sown


@dataclasses.dataclass(frozen=True)
class GuideConfig:
    """The run that guides the routing of stages, with its newest checkpoint."""

    run: str = ""  # its folder; empty: none guides
    # ``replay``: tokens take the experts that it chose, with gates of today's scores. ``distil``: a loss
    # draws the softmax of every router's logits to that of its own.
    way: Literal["replay", "distil"] = "distil"
    weight: float = 1.0  # of the loss of ``distil``
    stages: tuple[str, ...] = ()  # names of those that it guides; empty: all

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"guide.weight={self.weight} must be > 0")


def check(config: GuideConfig, ours: Stacks, theirs: Stacks) -> None:
    """Makes sure that the run can guide the model.

    Raises:
      ValueError: its routers are others, or the scheme takes no routes; names the stack.
    """
    if not ours:
        raise ValueError("guide: the model has no routed experts")
    for name, stack in ours.items():
        other = theirs.get(name)
        sizes = [
            None if of is None else (len(of.layers), of.moe.num_experts, scheme_of(of.moe).columns(of.moe))
            for of in (stack, other)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"guide.run={config.run}: {name} has {sizes[1]} layers, experts and router columns there and "
                f"{sizes[0]} here"
            )
        if config.way == "replay" and not scheme_of(stack.moe).replays:
            raise ValueError(f"guide.way='replay': scheme={stack.moe.scheme!r} of {name} takes no routes")


def recorded(params: Any, state: Any, batch: Batch, *, layout: Layout, collections: Any) -> Batch:
    """The batch with the routes that its tokens have in a model.

    Raises:
      ValueError: tokens have no choices.
    """
    found = _decided(params, state, batch, layout=layout, collections=collections)
    for name, layers in found.items():
        if not all(isinstance(layer.assignment, TokenChoice) for layer in layers):
            raise ValueError(f"{name}: its tokens have no choices that could be replayed")
    routes = {n: jnp.stack([layer.assignment.experts for layer in layers]) for n, layers in found.items()}
    return replay.with_routes(batch, routes)


def taught(
    params: Any, state: Any, batch: Batch, *, layout: Layout, collections: Any, weight: float
) -> Batch:
    """The batch with the logits of a model's routers, and how much they count."""
    found = _decided(params, state, batch, layout=layout, collections=collections)
    logits = {name: jnp.stack([layer.logits for layer in layers]) for name, layers in found.items()}
    return replay.with_logits(batch, logits, weight)


def _decided(params: Any, state: Any, batch: Batch, *, layout: Layout, collections: Any) -> dict[str, Any]:
    variables = {"params": params, **collections}
    kept = layout.model.apply(variables, batch, state, mutable=["intermediates"])[1]
    known = layout.model.config.stacks
    return {name: sown(kept["intermediates"], stack) for name, stack in known.items()}


class Guided:
    """A stream of batches that bring the routing of another run; all else is the stream's own."""

    def __init__(self, stream: Any, fill: Any, layout: Layout):
        self._stream, self._fill, self._layout = stream, fill, layout

    @property
    def skipped(self) -> dict[str, int]:
        """As the stream says."""
        return self._stream.skipped

    def get_state(self) -> dict[str, Any]:
        """As the stream says."""
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Sets the stream to a position."""
        self._stream.set_state(state)

    def close(self) -> None:
        """Closes the stream."""
        self._stream.close()

    def __iter__(self) -> Guided:
        return self

    def __next__(self) -> Batch:
        batch = next(self._stream)
        with sharding.use_mesh(self._layout.mesh, self._layout.rules):
            found = self._fill(put_batch(batch, self._layout))
        brought = {name: given for name, given in found.media.items() if name not in batch.media}
        return dataclasses.replace(batch, media={**batch.media, **jax.device_get(brought)})


def guided(stream: Any, config: GuideConfig, ours: Layout, theirs: Layout, state: Any) -> Guided:
    """The stream of a stage, guided by a state of another run.

    Raises:
      ValueError: it cannot guide this model, or there are several processes.
    """
    try:
        if jax.process_count() > 1:
            raise ValueError("guide: it is for one process, and there are several")
        check(config, ours.model.config.stacks, theirs.model.config.stacks)
    except ValueError as error:
        raise ValueError(f"config.{error}") from None
    fill = functools.partial(recorded if config.way == "replay" else taught, layout=theirs)
    if config.way == "distil":
        fill = functools.partial(fill, weight=config.weight)
    compiled = jax.jit(fill)
    run = functools.partial(compiled, state.params, state.routing, collections=state.collections)
    return Guided(stream, run, theirs)
