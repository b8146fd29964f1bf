"""Stacks: the sparse layers of one part of a model, with one MoE config, their state and statistics.

A model may have several, such as those of its encoder and of its decoder. Everything that belongs to sparse
layers is a dictionary by the name of the stack: the state of routing, statistics, losses, plots. Layers are
the leading axis of every array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vl_jax.kernels.activation import Activation
from vl_jax.moe import balance, routing
from vl_jax.moe import figures as figures_lib
from vl_jax.moe.layer import MoEOutput
from vl_jax.moe.routing import MoEConfig, RoutingStats, State

RoutingState = dict[str, State]  # of a model: the state of every stack, by its name


@dataclasses.dataclass(frozen=True)
class Stack:
    """The sparse layers of one part of a model."""

    moe: MoEConfig
    layers: tuple[int, ...]  # their numbers among all layers of the part
    runs: tuple[tuple[str, ...], ...]  # where the layers stand: paths of the modules that hold them, in order
    dense: Activation | None = None  # of the part's layers without experts


Stacks = Mapping[str, Stack]  # by name; the first is the main one


def check_packed(moe: MoEConfig, where: str) -> None:
    """Refuses routing by which samples that are packed in a row would act on one another.

    Args:
      where: the path of the config, for the message.

    Raises:
      ValueError: names what does not fit packed rows.
    """
    if not routing.is_causal(moe):
        raise ValueError(
            f"data.packing with {where}.scheme={moe.scheme!r}, limit.priority={moe.limit.priority!r}: tokens "
            "of a row are routed together, and the samples packed in it would act on one another"
        )
    if moe.balance.scope == "sequence":
        raise ValueError(
            f"data.packing with {where}.balance.scope='sequence': a packed row is no sequence; it must be "
            "'batch' or 'step'"
        )


def init_state(stacks: Stacks) -> RoutingState:
    """The initial state of every stack's scheme."""

    def of(stack: Stack) -> State:
        return jax.tree.map(
            lambda a: jnp.repeat(a[None], len(stack.layers), axis=0), routing.init_state(stack.moe)
        )

    return {name: of(stack) for name, stack in stacks.items()}


def update_state(state: RoutingState, stats: Mapping[str, RoutingStats], stacks: Stacks) -> RoutingState:
    """One step of every stack's scheme per layer, from statistics summed over the optimiser step."""

    def of(name: str, before: State) -> State:
        if not before or name not in stats:
            return before
        moe = stacks[name].moe
        return jax.vmap(lambda s, t: routing.update_state(s, t, moe))(before, stats[name])

    return {name: of(name, before) for name, before in state.items()}


def init_load(stacks: Stacks) -> dict[str, np.ndarray]:
    """The running load before the first step, f32[L E] by stack."""
    return {
        name: np.zeros((len(stack.layers), stack.moe.num_experts), np.float32)
        for name, stack in stacks.items()
    }


def update_load(
    load: Mapping[str, Float[Array, "L E"]], stats: Mapping[str, RoutingStats]
) -> dict[str, Float[Array, "L E"]]:
    """The running load of every stack that has one and that counted something in this step."""
    return {
        name: balance.running_load(before, stats[name]) if name in stats else before
        for name, before in load.items()
    }


def summarize(
    stats: Mapping[str, RoutingStats],
    load: Mapping[str, Float[Array, "L E"]],
    stacks: Stacks,
    state: RoutingState,
) -> dict[str, jax.Array]:
    """The figures of ``balance`` and ``figures``, MaxVio of the running load, and the state of schemes.

    They have their names in the log; state is ``state_NAME``.
    """
    figures = {}
    for name in (name for name in stacks if name in stats):
        told = balance.summarize(stats[name]) | figures_lib.summarize(stats[name])
        told |= {f"state_{entry}": value for entry, value in state.get(name, {}).items()}
        figures |= {log_name(name, key, stacks): v for key, v in told.items()}
        if name in load:
            figures[log_name(name, "maxvio_running", stacks)] = balance.max_violation(load[name])
    return figures


def log_name(stack: str, figure: str, stacks: Stacks) -> str:
    """``routing/<figure>`` for the main stack of a model, ``routing/<stack>/<figure>`` for others."""
    return f"routing/{figure}" if stack == next(iter(stacks)) else f"routing/{stack}/{figure}"


class Routed(NamedTuple):
    """What one sparse layer decided, over routing groups B of T tokens."""

    logits: jax.Array  # f32[B T N]
    scores: jax.Array  # f32[B T E], see ``routing.probabilities``
    assignment: Any  # an ``Assignment`` with a leading B
    valid: jax.Array  # bool[B T]
    modality: jax.Array  # i32[B T]


def sown(intermediates: Mapping[str, Any], stack: Stack) -> list[Routed]:
    """What every layer of a stack decided, in order, as ``DynamicMoE`` sowed it."""
    result = []
    for path in stack.runs:
        found: Any = intermediates
        for name in path:
            found = found[name]
        layers = Routed(*(found[name][0] for name in Routed._fields))
        for i in range(layers.logits.shape[0]):
            result.append(jax.tree.map(lambda a, i=i: a[i], layers))
    return result


def state_of(state: Mapping[str, State], part: str, stacks: Stacks) -> State | dict[str, State]:
    """The state of a part's layers: that of its stack, or of several the state of each, see ``per_layer``."""
    own = {name.removeprefix(part): state.get(name, {}) for name in stacks if name.startswith(part)}
    return own if own.keys() - {""} else own.get("", {})


def by_name(routed: MoEOutput | Mapping[str, MoEOutput] | None, part: str) -> dict[str, MoEOutput]:
    """What a part's layers returned, by the names of its stacks."""
    outputs = routed if isinstance(routed, Mapping) else {} if routed is None else {"": routed}
    return {part + name: output for name, output in outputs.items()}


def auxiliary_and_stats(routed: Mapping[str, MoEOutput]) -> tuple[jax.Array, dict[str, RoutingStats]]:
    """The sum of the losses that the sparse layers bring, already weighted, and their statistics."""
    total = jnp.zeros((), jnp.float32)
    for output in routed.values():
        total = sum((jnp.sum(value) for value in output.losses.values()), total)
    return total, {name: output.stats for name, output in routed.items()}
