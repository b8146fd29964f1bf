"""A scheme in a small layer without shared experts, and what one run of it gives; see ``conformance``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.moe import routing
from vl_jax.moe.assignment import Assignment, RoutingContext
from vl_jax.moe.checks.decisions import make_inputs
from vl_jax.moe.config import SharedExpertsConfig
from vl_jax.moe.layer import DynamicMoE, MoEOutput, handed_on
from vl_jax.moe.routing import MoEConfig

NO_SHARED = SharedExpertsConfig(num=0)
TOLERANCE = 1e-5  # of norms, in float32: other orders of addition


@dataclasses.dataclass(frozen=True)
class Output:
    """What one run of the layer gave."""

    y: Any  # [G T D]
    assignment: Assignment
    layer: MoEOutput
    gradients: Any  # of parameters and input
    state: Any  # of the scheme, after an update


@dataclasses.dataclass(frozen=True)
class Subject:
    """A scheme in a small layer without shared experts, and inputs for it."""

    config: MoEConfig
    params: Any
    state: Any
    x: np.ndarray  # [G T D]
    context: RoutingContext

    def run(self, *, training: bool = True, config: MoEConfig | None = None, **inputs: Any) -> Output:
        """Runs the layer, forward and backward, with some inputs replaced.

        Args:
          training: with noise, if the scheme draws any.
        """
        config = config or self.config
        noisy = training and routing.scheme_of(config).rng
        x, context = inputs.get("x", self.x), inputs.get("context", self.context)
        params, state = inputs.get("params", self.params), inputs.get("state", self.state)
        return Output(*jax.device_get(_compiled(config, noisy)(params, state, x, context)))


@functools.cache
def _compiled(config: MoEConfig, noisy: bool) -> Callable[..., tuple]:
    """The layer's outputs and gradients; under a mesh it is traced again."""

    def objective(params: Any, x: Any, state: Any, context: Any) -> tuple[jax.Array, tuple]:
        rngs = {"routing": jax.random.key(0)} if noisy else None
        (y, output), kept = DynamicMoE(config).apply(  # pyright: ignore[reportGeneralTypeIssues]
            {"params": params}, x, context, state, rngs=rngs, mutable=["intermediates"]
        )
        total = jnp.sum(jnp.sin(y)) + sum(output.losses.values())
        return total, (y, kept["intermediates"]["assignment"][0], handed_on(output)[1])

    @jax.jit
    def run(params: Any, state: Any, x: Any, context: Any) -> tuple:
        value = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (_, (y, assignment, output)), gradients = value(params, x, state, context)
        own = {name: value for name, value in state.items() if name != routing.ROUTES}
        return y, assignment, output, gradients, routing.update_state(own, output.stats, config)

    return run


def make_subject(config: MoEConfig, *, with_key: bool = False) -> Subject:
    """A layer with random parameters, its initial state, and inputs for it.

    Args:
      with_key: whether the layer is tried as in training, with a key for noise.
    """
    random, (x, context), state = np.random.default_rng(0), make_inputs(0, config), routing.init_state(config)
    layer = DynamicMoE(config)
    keys = {name: jax.random.key(0) for name in ("params", *(("routing",) if with_key else ()))}
    shapes = jax.eval_shape(layer.init, keys, x, context, state)["params"]
    params = jax.tree.map(lambda p: 0.5 * random.standard_normal(p.shape, np.float32), nn.meta.unbox(shapes))
    return Subject(config, params, state, x, context)


def finite(what: str, tree: Any) -> None:
    """Raises ``AssertionError`` if a leaf is not."""
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)), f"{what} is not finite"


def distance(a: Any, b: Any) -> float:
    """The norm of the difference, in units of the norm of ``b``."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-2))


def same(what: str, actual: Any, expected: Any) -> None:
    """Raises ``AssertionError`` if leaves differ by more than ``TOLERANCE``."""
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        off = distance(a, b)
        name = jax.tree_util.keystr(path)
        assert off <= TOLERANCE, f"{what}{' ' * bool(name)}{name} differs by {off:.1e} of its norm"
