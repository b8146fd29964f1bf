"""Progressive unfreezing: layers begin to train one after the other, within one compiled program.

    step      0 ......... 100 ........ 200 ........
    head      trains      trains       trains
    layer 2   asleep      trains       trains         Unfreeze("image/blocks/.*", (100, 200, 300))
    layer 1   asleep      asleep       trains

The gradient of what is asleep is zero for all that reads it, norm and moments included, and its update is
none. (Howard and Ruder 2018, arXiv 1801.06146, section 3.3.) Running statistics of a batch are no parameters,
and move from the beginning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vl_jax import params as params_lib


@dataclasses.dataclass(frozen=True)
class Unfreeze:
    """When some parameters begin to train."""

    pattern: str  # of paths
    steps: tuple[int, ...]  # of the stage; several: of layers, the topmost first, the last step for the rest

    def __post_init__(self):
        if not self.steps or min(self.steps) < 0:
            raise ValueError(
                f"steps={self.steps} of unfreeze {self.pattern!r}: expected one or more, each >= 0"
            )


def first_steps(
    config: Iterable[Unfreeze], tree: params_lib.Tree, layers: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The step before which a leaf sleeps, i32[] or by layer i32[L], by path; a later pattern overrules.

    Args:
      tree: parameters, in which the patterns must match.
      layers: how many there are, by the path of a leaf whose first axis counts them.

    Raises:
      ValueError: a pattern matches no parameter, or one without layers where several steps are given.
    """
    found: dict[str, np.ndarray] = {}
    for rule in config:
        for path in sorted(params_lib.select(tree, (rule.pattern,))):
            if len(rule.steps) == 1:
                found[path] = np.asarray(rule.steps[0], np.int32)
                continue
            if path not in layers or layers[path] < len(rule.steps):
                raise ValueError(
                    f"unfreeze {rule.pattern!r} has {len(rule.steps)} steps, and {path} has "
                    f"{layers.get(path, 0)} layers: must be at least as many"
                )
            steps = [*rule.steps, *[rule.steps[-1]] * (layers[path] - len(rule.steps))]
            found[path] = np.asarray(steps[::-1], np.int32)
    return found


class InTurn(NamedTuple):
    """The state of an optimiser whose leaves begin one after the other."""

    count: jax.Array  # i32[] steps done
    inner: Any


def in_turn(
    optimizer: optax.GradientTransformation, begins: Mapping[str, np.ndarray]
) -> optax.GradientTransformationExtraArgs:
    """The optimiser, under which leaves sleep until their step.

    Args:
      begins: by path, what ``first_steps`` gave.
    """
    inner = optax.with_extra_args_support(optimizer)

    def awake(tree: Any, count: jax.Array, other: float = 0.0) -> Any:
        def one(path: str, leaf: jax.Array) -> jax.Array:
            if path not in begins:
                return leaf
            begin = begins[path].reshape(begins[path].shape + (1,) * (leaf.ndim - begins[path].ndim))
            return jnp.where(count >= begin, leaf, jnp.asarray(other, leaf.dtype))

        return params_lib.map_paths(one, tree)

    def init(params: Any) -> InTurn:
        return InTurn(jnp.zeros((), jnp.int32), inner.init(params))

    def update(
        updates: Any, state: InTurn, params: Any = None, *, plain: Any = None, **extra: Any
    ) -> tuple[Any, InTurn]:
        if plain is not None:
            extra["plain"] = awake(plain, state.count)
        found, moments = inner.update(awake(updates, state.count), state.inner, params, **extra)
        # Adding minus zero leaves every number as it is.
        return awake(found, state.count, -0.0), InTurn(state.count + 1, moments)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
