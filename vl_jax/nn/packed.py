"""Weights that are kept small and put together where they are used: int8 numbers, scales, and adapters.

    params {"w_in": Packed(int8[L E D 2 F], scale[L E 1 2 F], a, b)}
        --scan over layers-->  Packed of one layer  --unpack-->  f32[E D 2 F], for as long as the layer runs

Only a layer's own weights are ever whole. The layer keeps nothing but its input for the backward pass and
puts them together again there: what is kept would else be every weight as floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Float, Int8

from vl_jax.nn.low_rank import add_product
from vl_jax.params import Leaf
from vl_jax.roles import Role

Layer = TypeVar("Layer", bound=type[nn.Module])


def dequantize(values: Int8[Array, "*weight"], scale: Float[Array, "*scale"]) -> Float[Array, "*weight"]:
    """The weight that int8 numbers stand for; ``scale`` has size 1 along the axes that share one."""
    return values.astype(scale.dtype) * scale


@struct.dataclass
class Packed:
    """A hidden matrix in int8, and its adapter if there is one; layers may be stacked in front."""

    values: Leaf  # i8[*weight]
    scale: Leaf  # f32[*weight], of size 1 along the inputs
    a: Leaf | None  # factors of the adapter; None: there is none
    b: Leaf | None
    times: float = struct.field(pytree_node=False)  # what the product of the factors is multiplied by
    role: Role = struct.field(pytree_node=False)

    def unpack(self) -> jax.Array:
        """The weight, adapter added."""
        weight = dequantize(self.values, self.scale)
        if self.a is None or self.b is None:
            return weight
        return add_product(weight, self.a, self.b, self.times, self.role)


def layer_of(
    layer: Layer,
    parent: nn.Module,
    name: str,
    *,
    remat: bool = False,
    policy: Callable[..., bool] | None = None,
) -> Layer:
    """The layer, to be scanned under a name in its parent; it unpacks its own parameters if these are packed.

    Args:
      remat: whether it keeps only what the policy says for the backward pass; None: only its input. A layer
        with packed parameters keeps only its input.
    """
    params = parent.variables.get("params", {}).get(name, {})
    if any(isinstance(leaf, Packed) for leaf in jax.tree.leaves(params, is_leaf=_is_packed)):
        return nn.remat(nn.map_variables(layer, "params", trans_in_fn=_unpacked), prevent_cse=False)
    return nn.remat(layer, prevent_cse=False, policy=policy) if remat else layer


def _unpacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.unpack() if _is_packed(x) else x, tree, is_leaf=_is_packed)


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Packed)
