"""What a parameter is to optimiser, adapters and compression: said once, where the module creates it.

    named(fan_in(), "embed", "heads", None, inputs=(0,))        a hidden matrix D -> N H, which decays
    named(fan_in(), "embed", None, decay=True)                  a router: no hidden matrix, but it decays
    named(nn.initializers.ones, None)                           a norm's scale: neither

The role travels with the value: in the box ``Named`` while the module initialises, in
``sharding.Placement`` afterwards.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
from flax import struct


@dataclasses.dataclass(frozen=True)
class Role:
    """Axes are counted from the end, so that stacking layers in front moves none of them.

    Axes that are neither inputs nor outputs stack matrices of their own (layers, experts, gate and up).
    """

    inputs: tuple[int, ...] = ()  # axes of a hidden matrix that its input is summed over; empty: no matrix
    outputs: tuple[int, ...] = ()  # axes that its output has
    decay: bool = False  # whether weight decay draws it to zero
    experts: int | None = None  # of a hidden matrix, the axis that counts experts

    @property
    def is_matrix(self) -> bool:
        """Whether it is a hidden matrix: one that Muon makes orthogonal, and that may take an adapter."""
        return bool(self.inputs)

    def layers(self, ndim: int) -> int | None:
        """Of a hidden matrix with so many axes, the axis that counts layers; None: none are stacked."""
        experts = () if self.experts is None else (self.experts,)
        own = {a % ndim for a in (*self.inputs, *self.outputs, *experts)}
        return None if 0 in own else 0


# What nobody said the role of: a weight that decays, and no matrix.
ORDINARY = Role(decay=True)


def role_of(
    ndim: int,
    *,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    decay: bool | None,
    experts: int | None = None,
) -> Role:
    """The role of a parameter of ``ndim`` axes; what ``named`` takes, defaults filled in.

    Args:
      inputs: axes, from the front as the module creates them; empty makes it no matrix.
      outputs: the same; empty: all that are no inputs.
      decay: None: exactly if it is a matrix.
      experts: the axis that counts experts, if there is one; of what is no matrix it is not kept.

    Raises:
      ValueError: an axis is both, or is none of the parameter's.
    """
    if inputs and not outputs:
        outputs = tuple(a for a in range(ndim) if a not in inputs)
    both = inputs + outputs
    if len(set(both)) < len(both) or not all(0 <= a < ndim for a in both) or bool(inputs) != bool(outputs):
        raise ValueError(f"inputs={inputs} and outputs={outputs} are no two sides of {ndim} axes")
    inputs, outputs = (tuple(a - ndim for a in side) for side in (inputs, outputs))
    counted = None if experts is None or not inputs else experts - ndim
    return Role(inputs, outputs, bool(inputs) if decay is None else decay, counted)


class Named(nn.LogicallyPartitioned):
    """The box of a parameter: its value, the logical names of its dimensions, and its role."""

    role: Role = struct.field(default=ORDINARY, pytree_node=False)
