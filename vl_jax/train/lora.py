"""Low-rank adapters (LoRA, arXiv 2106.09685, section 4.1) as functions over parameters; modules know of none.

    weight W   [*stack, *inputs, *outputs]     layers and experts are stacked; heads are inputs or outputs
    factor a   [*stack, *inputs, rank]         random
    factor b   [*stack, rank, *outputs]        zero, so that training begins with the model as it was
    merged     W + alpha / rank * a b          what the forward pass uses

The adapters of a model are a tree of their own: where the model has W, it has ``{"a", "b"}``. Which leaves
are matrices, and which of their axes are inputs and outputs, is their role, as for Muon: ``roles``. Weights
that adapters stand on may be kept in int8: ``compress.quantize`` says how, ``pack`` gives them to the layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import params as params_lib
from vl_jax.compress import quantize
from vl_jax.nn.low_rank import EVERYWHERE, Factors, Only, add_product, factors_of, filled_up
from vl_jax.nn.packed import Packed
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
    only: Only = EVERYWHERE  # the layers and experts of the targets that get any
    # What the weights that do not train are kept as: int8 takes a quarter of the memory for every hidden
    # matrix, and rounds it once, as the stage begins. Layers keep only their inputs for the backward pass.
    base: Literal["float", "int8"] = "float"

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"rank={self.rank} must be >= 1, alpha={self.alpha} > 0")
        if not self.targets:
            raise ValueError(f"targets=(): needs patterns of parameter paths, or names: {', '.join(GROUPS)}")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank


def targets(config: LoraConfig, params: params_lib.Tree, roles: Roles) -> list[str]:
    """Paths of the weights that get adapters; what a target matches besides matrices is passed over.

    Args:
      params: the parameters of the model, or their shapes.
      roles: of every parameter, by path.

    Raises:
      ValueError: a target matches no parameter, or none that is a matrix.
    """
    chosen: dict[str, None] = {}
    for target in config.targets:
        matched = sorted(params_lib.select(params, (GROUPS.get(target, target),)))
        matrices = [path for path in matched if roles[path].is_matrix]
        if not matrices:
            raise ValueError(
                f"pattern {target!r} matches no weight matrix, only {', '.join(matched[:3])}; "
                "embedding, head, router, norms and biases take no adapter"
            )
        chosen |= dict.fromkeys(matrices)
    return list(chosen)


def select(config: LoraConfig, params: params_lib.Tree, roles: Roles) -> dict[str, Factors]:
    """The weights that get adapters, by path, and how each is factored; arguments as of ``targets``.

    Raises:
      ValueError: as ``targets`` does; or a weight lacks a layer or an expert that is to get an adapter.
    """
    flat, chosen = params_lib.flatten(params), dict[str, Factors]()
    for path in targets(config, params, roles):
        try:
            factors = factors_of(roles[path], flat[path].shape, config.only)
        except ValueError as error:
            raise ValueError(f"{error} in {path}") from None
        assert factors is not None, path
        chosen[path] = factors
    if config.only.experts and all(roles[path].experts is None for path in chosen):
        raise ValueError(
            f"only.experts={config.only.experts}: no weight of targets={config.targets} has experts"
        )
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
        for name, axes in (("a", factors.a), ("b", factors.b)):
            result[f"{path}/{name}"] = _shape(flat[path], axes, config.rank, dict(factors.numbers))
    return params_lib.unflatten(result)


def _shape(
    weight: Any, axes: tuple[int | None, ...], rank: int, numbers: Mapping[int, tuple[int, ...]]
) -> jax.ShapeDtypeStruct:
    """The shape of a factor; an axis of which only some places have factors is whole on every device."""
    sizes = {i: len(numbers[i]) if i in numbers else size for i, size in enumerate(weight.shape)}
    shape = tuple(rank if i is None else sizes[i] for i in axes)
    whole = getattr(weight, "sharding", None)
    if not isinstance(whole, NamedSharding):
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    spec = (*whole.spec, *[None] * (weight.ndim - len(whole.spec)))
    parts = P(*(None if i is None or i in numbers else spec[i] for i in axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(whole.mesh, parts))


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


def merge(
    params: params_lib.Tree, adapters: params_lib.Tree, scale: float, roles: Roles, only: Only = EVERYWHERE
) -> dict[str, Any]:
    """The parameters as floating-point numbers, with ``W + scale * a b`` where there are adapters.

    Args:
      params: what is not in int8 and has no adapter stays as it is.
      roles: of every parameter that has an adapter, by path.
      only: the layers and experts that have adapters.
    """
    merged, factors = params_lib.flatten(quantize.whole(params)), params_lib.flatten(adapters)
    for path in paths_of(adapters):
        weight, role = merged[path], roles[path]
        a, b = filled_up(factors[f"{path}/a"], factors[f"{path}/b"], role, weight.shape, only)
        merged[path] = add_product(weight, a, b, scale, role)
    return params_lib.unflatten(merged)


def pack(
    params: params_lib.Tree,
    adapters: params_lib.Tree,
    scale: float,
    roles: Roles,
    only: Only = EVERYWHERE,
    stacked: Collection[str] = (),
) -> dict[str, Any]:
    """``merge`` for a model to compute with: weights in int8 that are stacked over layers stay so.

    Each of their layers puts its own together, adapter included: ``nn.packed``. Other arguments are those of
    ``merge``.

    Args:
      stacked: paths of the weights whose first axis counts layers.
    """
    small = quantize.paths_of(params) & set(stacked)
    chosen, rest = params_lib.split(params, {f"{path}/{name}" for path in small for name in quantize.PARTS})
    inside, outside = params_lib.split(adapters, {f"{path}/{name}" for path in small for name in "ab"})
    flat, factors = params_lib.flatten(chosen), params_lib.flatten(inside)
    result = params_lib.flatten(merge(rest, outside, scale, roles, only))
    for path in sorted(small):
        values, scales = (flat[f"{path}/{name}"] for name in quantize.PARTS)
        a, b = factors.get(f"{path}/a"), factors.get(f"{path}/b")
        if a is not None and b is not None:
            a, b = filled_up(a, b, roles[path], values.shape, only)
        result[path] = Packed(values, scales, a, b, times=scale, role=roles[path])
    return params_lib.unflatten(result)


def merge_in_int8(
    params: params_lib.Tree,
    adapters: params_lib.Tree,
    scale: float,
    roles: Roles,
    only: Only = EVERYWHERE,
    *,
    most_lost: float = 0.01,
) -> dict[str, Any]:
    """``merge``, with what was in int8 in int8 again. An adapter is often smaller than what that rounds off.

    Args:
      most_lost: how far what an adapter changes may be from what it should, relative to its size.

    Raises:
      ValueError: rounding would lose more of an adapter.
    """
    small, before = quantize.paths_of(params), params_lib.flatten(quantize.whole(params))
    merged = merge(params, adapters, scale, roles, only)
    result = quantize.quantized(merged, small, roles)
    flat, after = params_lib.flatten(merged), params_lib.flatten(quantize.whole(result))
    for path in sorted(small.intersection(paths_of(adapters))):
        size = float(jnp.linalg.norm(flat[path] - before[path]))
        lost = float(jnp.linalg.norm(after[path] - flat[path]))
        if lost > most_lost * size:
            raise ValueError(
                f"{path} in int8 loses {lost / size if size else 1.0:.0%} of its adapter, more than "
                f"most_lost={most_lost:.0%}; merge it into floating-point weights, or keep it apart"
            )
    return result


def paths_of(adapters: params_lib.Tree) -> list[str]:
    """The paths of the weights that adapters are of."""
    return sorted({path.rpartition("/")[0] for path in params_lib.flatten(adapters)})
