"""Hidden matrices in int8: every output channel of every layer and expert has a scale of its own.

    weight W   [*stack, *inputs, *outputs]     float
    scale      [*stack, 1, *outputs]           largest |W| of the channel / 127
    int8       [*stack, *inputs, *outputs]     round(W / scale), from -127 to 127
    restored   int8 * scale                    at most scale / 2 away from W

In a tree ``{"int8", "scale"}`` stands where W was. Which axes are inputs is the role of a parameter. The
package qwix does the same for layers that it can watch at work; stacks of scanned layers, and experts whose
weights go to functions and kernels, it cannot (0.1.8).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int8

from vl_jax import params as params_lib
from vl_jax.nn.packed import dequantize
from vl_jax.roles import Role
from vl_jax.runtime.lazy_array import Index, LazyArray

LARGEST = 127  # symmetric: -128 is not used
PARTS = ("int8", "scale")  # what stands where a weight was
Roles = Mapping[str, Role]


def quantize(
    weight: Float[Array, "*weight"], role: Role
) -> tuple[Int8[Array, "*weight"], Float[Array, "*scale"]]:
    """The int8 numbers of a hidden matrix, and the scale of each channel; see the top of the file."""
    wide = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=role.inputs, keepdims=True)
    # Not zero, nor so small that a device takes it for zero.
    scale = jnp.maximum(largest / LARGEST, jnp.finfo(jnp.float32).tiny)
    return jnp.round(wide / scale).astype(jnp.int8), scale


def select(params: params_lib.Tree, roles: Roles, patterns: Collection[str] = (".*",)) -> set[str]:
    """The hidden matrices that patterns of paths match.

    Raises:
      ValueError: a pattern matches no parameter, or no hidden matrix.
    """
    chosen = set()
    for pattern in patterns:
        matched = params_lib.select(params, (pattern,))
        matrices = {path for path in matched if roles[path].is_matrix}
        if not matrices:
            raise ValueError(
                f"pattern {pattern!r} matches no weight matrix, only {', '.join(sorted(matched)[:3])}; "
                "embedding, head, router, norms and biases stay as they are"
            )
        chosen |= matrices
    return chosen


def quantized(params: params_lib.Tree, paths: Collection[str], roles: Roles) -> dict[str, Any]:
    """The parameters, those of some paths in int8."""
    result = params_lib.flatten(params)
    for path in paths:
        values, scale = quantize(result.pop(path), roles[path])
        result |= dict(zip((f"{path}/{part}" for part in PARTS), (values, scale), strict=True))
    return params_lib.unflatten(result)


def shapes(params: params_lib.Tree, paths: Collection[str], roles: Roles) -> dict[str, Any]:
    """Shapes of what ``quantized`` gives; on a mesh, each axis lies as that axis of its weight does."""
    result = params_lib.flatten(params)
    for path in paths:
        weight = result.pop(path)
        inputs = {a % weight.ndim for a in roles[path].inputs}
        shape = tuple(1 if i in inputs else size for i, size in enumerate(weight.shape))
        whole, sharding = getattr(weight, "sharding", None), None
        if isinstance(whole, NamedSharding):
            spec = (*whole.spec, *[None] * (weight.ndim - len(whole.spec)))
            parts = P(*(None if i in inputs else axes for i, axes in enumerate(spec)))
            sharding = NamedSharding(whole.mesh, parts)
        result[f"{path}/int8"] = jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=whole)
        result[f"{path}/scale"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return params_lib.unflatten(result)


def paths_of(params: params_lib.Tree) -> set[str]:
    """The paths of the weights that are in int8."""
    flat = params_lib.flatten(params)
    at = (path.rpartition("/")[0] for path in flat if path.endswith("/int8"))
    return {path for path in at if f"{path}/scale" in flat}


def whole(params: params_lib.Tree) -> dict[str, Any]:
    """The inverse of ``quantized``, but for what it rounded off: float32 weights where there was int8."""
    result = params_lib.flatten(params)
    for path in paths_of(params):
        values, scale = (result.pop(f"{path}/{part}") for part in PARTS)
        result[path] = dequantize(values, scale)
    return params_lib.unflatten(result)


def whole_when_read(flat: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """``whole`` of the leaves of a checkpoint by path; int8 is read when a part of a weight is asked for."""
    result = dict(flat)
    for path in paths_of(params_lib.unflatten(flat)):
        values, scale = (result.pop(f"{path}/{part}") for part in PARTS)

        def read(index: Index, values: LazyArray = values, scale: LazyArray = scale) -> np.ndarray:
            shared = (slice(None) if n == 1 else i for i, n in zip(index, scale.shape, strict=True))
            return values[index].astype(np.float32) * scale[tuple(shared)]

        result[path] = LazyArray(values.shape, np.dtype(np.float32), read)
    return result


def size(tree: Any) -> int:
    """Bytes of all leaves of a tree of arrays or their shapes."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def errors(params: params_lib.Tree, paths: Collection[str], roles: Roles) -> dict[str, float]:
    """How far each weight is from what int8 makes of it, relative to its size (Frobenius norms)."""
    flat, found = params_lib.flatten(params), {}
    for path in sorted(paths):
        weight = flat[path].astype(jnp.float32)
        rounded = jnp.linalg.norm(weight - dequantize(*quantize(weight, roles[path])))
        found[path] = float(rounded / jnp.maximum(jnp.linalg.norm(weight), jnp.finfo(jnp.float32).tiny))
    return found
