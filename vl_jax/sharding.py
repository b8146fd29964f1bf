"""Where arrays live: a mesh of four axes, typed rules from logical names to mesh axes, and constraints.

    logical names of a dimension          AxisRules            mesh axes
    ("experts", "embed", None, "mlp")  --------------->  P("expert", "fsdp", None, "tensor")

Model code names dimensions and nothing else; what a machine varies is the mesh. A batch is spread over
``data``, ``fsdp`` and ``expert`` alike: outside the expert layers, the expert axis is one more data axis.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import params as params_lib
from vl_jax.roles import ORDINARY, Named, Role

MESH_AXES = ("data", "fsdp", "expert", "tensor")
Names = Sequence[str | None]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, "all devices that remain"."""

    data: int = -1  # replicas of the parameters
    fsdp: int = 1  # shards of parameters and optimiser state, gathered when used
    expert: int = 1  # shards of the expert axis
    tensor: int = 1  # shards of heads, hidden widths and vocabulary

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sum(s == -1 for s in sizes) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise ValueError(f"mesh sizes {self.describe()}: each must be >= 1, at most one may be -1")

    def describe(self) -> str:
        return " x ".join(f"{name}={getattr(self, name)}" for name in MESH_AXES)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh over all (or the given) devices.

    Raises:
      ValueError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(dataclasses.astuple(config))
    fixed = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.mesh: {config.describe()} does not divide the {len(devices)} device(s) here; "
            f"the product of the axes must be {len(devices)} (-1 takes what remains)"
        )
    return Mesh(np.array(devices).reshape(sizes), MESH_AXES)


def mesh_of(text: str) -> MeshConfig:
    """The mesh of words such as ``fsdp=64,expert=2``; an axis that is not named is 1.

    Raises:
      ValueError: an axis does not exist or is named twice, or a size is no number of at least 1.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    names = [part.partition("=")[0].strip() for part in text.split(",")]
    for name, part in zip(names, text.split(","), strict=True):
        size = part.partition("=")[2].strip()
        if name not in sizes or names.count(name) > 1 or not size.isdecimal() or not int(size):
            known = ", ".join(MESH_AXES)
            raise ValueError(f"{text}: {part.strip()!r}: must be like fsdp=8, once each; axes are {known}")
        sizes[name] = int(size)
    return MeshConfig(**sizes)


@dataclasses.dataclass(frozen=True)
class AbsentDevice:
    """Stands for a device in a mesh on which nothing is computed."""

    id: int
    platform: str = "absent"
    device_kind: str = "absent"
    process_index: int = 0
    client: Any = None


def absent_mesh(config: MeshConfig) -> Mesh:
    """A mesh of as many devices as its axes say, none of which exists: for shapes and shardings alone."""
    return make_mesh(config, [AbsentDevice(n) for n in range(math.prod(dataclasses.astuple(config)))])


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Mesh axes of each logical dimension name. The empty tuple keeps a dimension whole."""

    batch: tuple[str, ...] = ("data", "fsdp", "expert")
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    layers: tuple[str, ...] = ()

    def spec(self, names: Names) -> P:
        """Translates logical names; ``None`` keeps a dimension whole.

        Raises:
          ValueError: a name is unknown, or one mesh axis would shard two dimensions.
        """
        known = {f.name for f in dataclasses.fields(self)}
        axes: list[tuple[str, ...]] = []
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"logical axis {name!r} is not one of {', '.join(sorted(known))}")
            axes.append(() if name is None else getattr(self, name))
        used = [a for group in axes for a in group]
        twice = sorted({a for a in used if used.count(a) > 1})
        if twice:
            raise ValueError(f"dimensions {tuple(names)} would use mesh axis {', '.join(twice)} twice")
        return P(*(a[0] if len(a) == 1 else (a or None) for a in axes))


_rules: contextvars.ContextVar[AxisRules] = contextvars.ContextVar("rules", default=AxisRules())


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: AxisRules | None = None) -> Iterator[None]:
    """Makes a mesh (and rules) current: ``constrain`` and the expert exchange read them while tracing."""
    token = _rules.set(rules or AxisRules())
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The current mesh, or None where there is none, where it has a single device, and in ``shard_map``.

    There every device has its own rows, and nobody lays anything out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.manual_axes else mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks the compiler to lay out an activation by the logical names of its dimensions."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, current_rules().spec(names))


def constrain_weight(x: jax.Array, *names: str | None) -> jax.Array:
    """``constrain`` for a weight, or what it is cast to: a dimension that does not divide stays whole.

    It acts on the gradient as well, which is summed where the weight lives, and not on every device.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, divisible(current_rules().spec(names), x.shape, mesh))


def gather_weight(x: jax.Array, *names: str | None, rows: int) -> jax.Array:
    """A weight made whole along the axes that cut it and the rows it is multiplied with alike.

    There every device has rows of its own and needs all of the weight. Unless told so, the compiler for TPUs
    may cut the product into a step for each device's part, a longer program that takes longer to compile. The
    gradient is summed to where the weight lives.

    Args:
      rows: of the batch that the weight is for.
    """
    mesh = current_mesh()
    if mesh is None:
        return x
    shared, kept = cut_along("batch", rows), divisible(current_rules().spec(names), x.shape, mesh)
    whole = P(*(tuple(a for a in _axes(part) if a not in shared) or None for part in kept))
    return x if whole == P(*(_axes(part) or None for part in kept)) else _gathered(x, kept, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, kept: P, whole: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(x, kept), whole)


_gathered.defvjp(
    lambda x, kept, whole: (_gathered(x, kept, whole), None),
    lambda kept, whole, _, grad: (jax.lax.with_sharding_constraint(grad, kept),),
)


def _axes(part: Any) -> tuple[str, ...]:
    """One entry of a spec as the axes that it names."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def divisible(spec: P, shape: Sequence[int], mesh: Any) -> P:
    """The spec without the parts that do not divide their dimension."""
    parts = []
    for size, part in zip(shape, spec, strict=True):
        axes = _axes(part)
        parts.append(None if size % math.prod(mesh.shape[axis] for axis in axes) else part)
    return P(*parts)


def cut_along(name: str, size: int) -> tuple[str, ...]:
    """The axes of the current mesh that cut a dimension of a name and size; () where it is whole."""
    mesh = current_mesh()
    if mesh is None:
        return ()
    (part,) = divisible(current_rules().spec((name,)), (size,), mesh)
    return tuple(axis for axis in _axes(part) if mesh.shape[axis] > 1)


def current_rules() -> AxisRules:
    """The rules made current by ``use_mesh`` (the defaults otherwise)."""
    return _rules.get()


def batch_axes(mesh: Any, rules: AxisRules | None = None) -> int:
    """The number of shards that the batch dimension is cut into."""
    return math.prod(mesh.shape[a] for a in (rules or AxisRules()).batch)


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one parameter is laid out; ``whole`` names dimensions kept whole because they do not divide."""

    names: tuple[str | None, ...]
    spec: P
    whole: tuple[str, ...]
    role: Role


def place(boxed: Any, mesh: Mesh, rules: AxisRules) -> dict[str, Placement]:
    """Decides the layout of every parameter in a tree of ``nn.LogicallyPartitioned`` leaves, abstract or not.

    A leaf whose box is no ``Named`` one counts as an ordinary weight, which decays.
    A dimension whose size is not a multiple of its mesh axes is kept whole and *named* in the result, so
    that the caller can report it.
    """
    placements = {}
    for path, box in params_lib.flatten(boxed).items():
        names = tuple(box.names) if isinstance(box, nn.LogicallyPartitioned) else (None,) * box.ndim
        role = box.role if isinstance(box, Named) else ORDINARY
        shape = nn.meta.unbox(box).shape
        if len(names) != len(shape):
            raise ValueError(f"parameter {path}: {len(names)} logical names for shape {shape}")
        parts, whole = [], []
        for name, size, part in zip(names, shape, rules.spec(names), strict=True):
            axes = (part,) if isinstance(part, str) else (part or ())
            if size % math.prod(mesh.shape[a] for a in axes):
                whole.append(f"{name}={size}")
                part = None
            parts.append(part)
        placements[path] = Placement(names, P(*parts), tuple(whole), role)
    return placements


def shardings(placements: dict[str, Placement], mesh: Mesh) -> dict[str, Any]:
    """The tree of ``NamedSharding`` that a placement stands for.

    Mesh axes of one device, which cut nothing, are left out, as jax leaves them out of what a step returns.
    The text of a program names the axes of its arguments: with others, a run that goes on would compile anew
    what it had compiled before.
    """
    return params_lib.unflatten({p: NamedSharding(mesh, _cuts(x.spec, mesh)) for p, x in placements.items()})


def _cuts(spec: P, mesh: Mesh) -> P:
    """The spec without mesh axes of one device."""
    parts = []
    for part in spec:
        axes = (part,) if isinstance(part, str) else (part or ())
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        parts.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*parts)


def batch_sharding(mesh: Mesh, rules: AxisRules | None = None) -> NamedSharding:
    """Every array of a batch is cut along its first dimension."""
    return NamedSharding(mesh, (rules or AxisRules()).spec(("batch",)))
