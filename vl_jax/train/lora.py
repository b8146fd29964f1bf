"""Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1) as functions over parameters; modules know of none.

    weight W   [*stack, *inputs, *outputs]     layers and experts are stacked; heads are inputs or outputs
    factor a   [*stack, *inputs, rank]         random
    factor b   [*stack, rank, *outputs]        zero, so that training begins with the model as it was
    merged     W + alpha / rank * a b          what the forward pass uses

The adapters of a model are a tree of their own: where the model has W, it has ``{"a", "b"}``. Which leaves
are matrices, and which of their axes are inputs and outputs, is their role, as for Muon: ``roles``.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from vl_jax import params as params_lib
from vl_jax.roles import Role

Roles = Mapping[str, Role]
# A factor is no matrix to Muon, and decays.
FACTOR = Role(decay=True)

# Short names of the weights one usually adapts, for use as targets.
GROUPS = {
    "attention": r"language/.*/attention/.*",
    "dense": r"language/.*/mlp/.*",
    "shared": r"language/.*/moe/shared/.*",
    "routed": r"language/.*/moe/w_(in|out)",
    "vision": r"encoder/.*",
    "projector": r"adapter/.*",
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which weights get adapters, and how large these are."""

    rank: int = 16
    alpha: float = 32.0  # adapters count alpha / rank times
    targets: tuple[str, ...] = ("attention",)  # names of ``GROUPS``, or patterns of parameter paths

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank} must be >= 1, alpha={self.alpha} > 0")
        if not self.targets:
            raise ValueError(f"targets=(): needs patterns of parameter paths, or names: {', '.join(GROUPS)}")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Factors:
    """How a weight is factored: for every axis of ``a`` and ``b`` that of the weight, None for the rank."""

    a: tuple[int | None, ...]
    b: tuple[int | None, ...]
    inputs: tuple[int, ...]

    @property
    def product(self) -> str:
        """The einsum that makes the weight's shape of ``a`` and ``b``."""
        a, b = ("".join("Z" if i is None else string.ascii_lowercase[i] for i in x) for x in (self.a, self.b))
        return f"{a},{b}->{''.join(sorted({*a, *b} - {'Z'}))}"


def _factor(role: Role, ndim: int) -> Factors | None:
    if not role.is_matrix:
        return None
    inputs, outputs = (tuple(a % ndim for a in side) for side in (role.inputs, role.outputs))
    stack = tuple(i for i in range(ndim) if i not in inputs + outputs)
    return Factors(a=(*stack, *inputs, None), b=(*stack, None, *outputs), inputs=inputs)


def select(config: LoraConfig, params: params_lib.Tree, roles: Roles) -> dict[str, Factors]:
    """The weights that get adapters, by path; what a target matches besides matrices is passed over.

    Args:
      params: the parameters of the model, or their shapes.
      roles: of every parameter, by path.

    Raises:
      ValueError: a target matches no parameter, or none that is a matrix.
    """
    every = {path: _factor(roles[path], leaf.ndim) for path, leaf in params_lib.flatten(params).items()}
    chosen: dict[str, Factors] = {}
    for target in config.targets:
        matched = sorted(params_lib.select(params, (GROUPS.get(target, target),)))
        matrices = {path: factors for path in matched if (factors := every[path]) is not None}
        if not matrices:
            raise ValueError(
                f"pattern {target!r} matches no weight matrix, only {', '.join(matched[:3])}; "
                "embedding, head, router, norms and biases take no adapter"
            )
        chosen |= matrices
    return chosen


def shapes(config: LoraConfig, params: params_lib.Tree, roles: Roles) -> dict[str, Any]:
    """Shapes of the adapters; on a mesh, each axis lies as that axis of its weight does.

    Args:
      params: the parameters of the model, or their shapes.
      roles: of every parameter, by path.

    Raises:
      ValueError: a target matches no weight matrix.
    """
    flat, result = params_lib.flatten(params), {}
    for path, factors in select(config, params, roles).items():
        result[f"{path}/a"] = _shape(flat[path], factors.a, config.rank)
        result[f"{path}/b"] = _shape(flat[path], factors.b, config.rank)
    return params_lib.unflatten(result)


def _shape(weight: Any, axes: tuple[int | None, ...], rank: int) -> jax.ShapeDtypeStruct:
    shape = tuple(rank if i is None else weight.shape[i] for i in axes)
    whole = getattr(weight, "sharding", None)
    if not isinstance(whole, NamedSharding):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    spec = (*whole.spec, *[None] * (weight.ndim - len(whole.spec)))
    sharding = NamedSharding(whole.mesh, P(*(None if i is None else spec[i] for i in axes)))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def init(config: LoraConfig, params: params_lib.Tree, roles: Roles, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters: ``a`` normal with variance 1 / fan-in, ``b`` zero.

    Args:
      params: the parameters of the model, or their shapes; their values are not used.
      roles: of every parameter, by path.
    """
    wanted, weights = params_lib.flatten(shapes(config, params, roles)), params_lib.flatten(params)
    chosen, result = select(config, params, roles), {}
    for (path, factors), one in zip(chosen.items(), jax.random.split(key, len(chosen)), strict=True):
        fan_in = math.prod(weights[path].shape[i] for i in factors.inputs)
        a, b = wanted[f"{path}/a"], wanted[f"{path}/b"]
        result[f"{path}/a"] = jax.random.normal(one, a.shape, a.dtype) * fan_in**-0.5
        result[f"{path}/b"] = jnp.zeros(b.shape, b.dtype)
    return params_lib.unflatten(result)


def merge(params: params_lib.Tree, adapters: params_lib.Tree, scale: float, roles: Roles) -> dict[str, Any]:
    """The parameters, with ``W + scale * a b`` where there are adapters; all other leaves as they are.

    Args:
      roles: of every parameter that has an adapter, by path.
    """
    merged, factors = params_lib.flatten(params), params_lib.flatten(adapters)
    for path in sorted({p.rpartition("/")[0] for p in factors}):
        merged[path] = add_product(
            merged[path], factors[f"{path}/a"], factors[f"{path}/b"], scale, roles[path]
        )
    return params_lib.unflatten(merged)


def add_product(
    weight: Float[Array, "*weight"],
    a: Float[Array, "*a rank"],
    b: Float[Array, "*b"],
    scale: float,
    role: Role,
) -> Float[Array, "*weight"]:
    """``W + scale * a b`` in float32, cast back to W's dtype; the role says which axes are multiplied."""
    factors = _factor(role, weight.ndim)
    assert factors is not None, role
    product = jnp.einsum(factors.product, a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + scale * product.astype(jnp.float32)).astype(weight.dtype)
