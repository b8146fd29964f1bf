"""What routed experts cost on a TPU that is not here: compiled for a named topology, by the compiler's count.

    python -m vl_jax benchmark routing --topology=v5e:2x4

One device: the layer from assignment to combined output, ours beside the other ways of ``routing_benchmark``
and beside megablox. All devices: experts cut over the topology and as many tokens on each, one row of the
table for every exchange. A way that does not compile stays in the table with what the compiler said, one that
is not for so many devices with the reason. Nothing runs, so this is no speed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import sharding
from vl_jax.benchmarks.routing import (
    ACCELERATOR_SHAPES,
    CAPACITY_FACTOR,
    MODES,
    Shape,
    Way,
    left_out,
    ways,
)
from vl_jax.fit import program_text
from vl_jax.kernels import aot
from vl_jax.kernels.combine import combine
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.permute import permute
from vl_jax.moe import dispatch, exchange
from vl_jax.moe.bounded import rooms
from vl_jax.moe.config import CapacityConfig, ExecutionConfig
from vl_jax.moe.routing import MoEConfig, TokenChoice
from vl_jax.sharding import MeshConfig, make_mesh

EXCHANGES = ("all_gather", "ring", "all_to_all", "ragged")
GROUP = 2048  # tokens of one row of a batch that is spread over devices, at most


def megablox(shape: Shape) -> Way:
    """Sorted rows and the grouped products that come with jax, tiles as large as every generation takes."""
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        assignment = TokenChoice(experts[None], gates[None])
        plan = dispatch.make_plan(assignment, num_experts=shape.num_experts)
        w_in = weights.w_in.reshape(*weights.w_in.shape[:2], -1)

        def product(rows: jax.Array, w: jax.Array) -> jax.Array:
            most = zip((rows.shape[0], *w.shape[1:]), (512, 1024, 512), strict=True)
            tiles = tuple(min(size, limit) for size, limit in most)
            return gmm(rows, w, plan.group_sizes, rows.dtype, tiles)

        rows = product(shape.activation(product(permute(x, plan.moves), w_in)), weights.w_out)
        return combine(rows, gates, plan.choice, plan.moves)

    return run


def run(
    topology: str, *, slices: int = 1, json_file: Path | None = None, shapes: tuple[Shape, ...] = ()
) -> dict[str, Any]:
    """Compiles everything for a topology such as ``v5e:2x4``, prints tables, and returns the figures.

    Args:
      slices: how many of that topology, joined by the network of the data centre.

    Raises:
      ValueError: there is no such topology, or no libtpu.
    """
    try:
        devices = aot.devices(topology, slices=slices)
    except Exception as error:  # libtpu raises what it likes
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}") from error
    result: dict[str, Any] = {"benchmark": "routing", "topology": topology, "device": devices[0].device_kind}
    result["layers"] = []
    for shape in shapes or ACCELERATOR_SHAPES:
        print(f"\n{shape}, compiled for {topology} ({devices[0].device_kind})", flush=True)
        entry: dict[str, Any] = {"shape": dataclasses.asdict(shape), "useful_flops": shape.flops, "modes": {}}
        mesh = _mesh(shape, devices)
        for mode, of in MODES.items():
            print(_HEAD.format(mode), flush=True)
            alone, spread = _alone(shape, devices, of), _spread(shape, mesh, of, slices=slices)
            entry["modes"][mode] = {**alone, **spread}
        entry["rooms"] = _rooms(shape, mesh, slices=slices)
        print(entry["rooms"] or "", flush=True)
        result["layers"].append(entry)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _alone(shape: Shape, devices: list[Any], of: Callable[[Way], Callable[..., Any]]) -> dict[str, Any]:
    """Every way on one device."""
    mesh = make_mesh(MeshConfig(), devices=devices[:1])
    place = NamedSharding(mesh, P())
    arguments = _arguments(shape, place, place, place)
    with sharding.use_mesh(mesh):
        found = {**ways(shape, platform="tpu"), "megablox": megablox(shape)}
        compiled = {name: _compile(name, of(way), arguments) for name, way in found.items()}
    for name, reason in left_out(shape, platform="tpu").items():
        compiled[name] = {"not_run": reason}
        print(f"  {name:26}not run: {reason}", flush=True)
    return compiled


def _mesh(shape: Shape, devices: list[Any]) -> Mesh:
    """Experts over as many devices as divide them, and tokens over all."""
    experts = math.gcd(len(devices), shape.num_experts)
    return make_mesh(MeshConfig(expert=experts), devices=devices)


def _exchanges(number: int, devices: int, *, slices: int) -> dict[str, ExecutionConfig | str]:
    """How tokens may reach the experts, by the name of the row; or why they may not.

    Args:
      number: of shards that experts are cut into.
    """
    found: dict[str, ExecutionConfig | str] = {}
    kinds: list[tuple[str, dict[str, Any]]] = [(kind, {"exchange": kind}) for kind in EXCHANGES]
    if slices > 1:
        kinds.append((f"ragged, {slices} slices", {"exchange": "ragged", "slices": slices}))
    for name, options in kinds:
        row = f"{name}, {devices} devices"
        if number == 1:
            found[row] = f"{number} of {devices} devices would have experts of their own"
        elif name == "ring" and number > exchange.MOST_IN_RING:
            found[row] = f"is for up to {exchange.MOST_IN_RING} shards, and there are {number}"
        elif number % options.get("slices", 1):
            found[row] = f"{number} shards of experts do not divide by the slices"
        else:
            found[row] = ExecutionConfig(**options)
    return found


def _config(shape: Shape, execution: ExecutionConfig) -> MoEConfig:
    return MoEConfig(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_dim=shape.hidden,
        activation=shape.activation,
        limit=CapacityConfig(factor=CAPACITY_FACTOR if execution.exchange == "all_to_all" else None),
        execution=execution,
    )


def _spread(
    shape: Shape, mesh: Mesh, of: Callable[[Way], Callable[..., Any]], *, slices: int
) -> dict[str, Any]:
    """Every exchange over all devices; a device's share of the work."""
    group = max(size for size in range(1, min(GROUP, shape.tokens) + 1) if shape.tokens % size == 0)
    rows = NamedSharding(mesh, sharding.AxisRules().spec(("batch",)))
    ends = (None, None, "tensor"), ("tensor", None)
    by_expert = [NamedSharding(mesh, P("expert", *names)) for names in ends]
    everywhere = dataclasses.replace(shape, tokens=shape.tokens * mesh.size)
    arguments = _arguments(everywhere, rows, *by_expert)

    def layer(config: MoEConfig) -> Way:
        def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
            x, experts, gates = (a.reshape(-1, group, a.shape[-1]) for a in (x, experts, gates))
            kept = TokenChoice(experts, gates)
            if not config.is_dropless:
                kept = dispatch.apply_capacity(kept, jnp.ones(experts.shape[:2], bool), config)[0]
            return exchange.apply_experts(x, kept, weights, config).reshape(-1, shape.width)

        return run

    found = {}
    with sharding.use_mesh(mesh):
        for name, execution in _exchanges(mesh.shape["expert"], mesh.size, slices=slices).items():
            if isinstance(execution, str):
                found[name] = {"not_run": execution}
                print(f"  {name:26}not run: {execution}", flush=True)
            else:
                found[name] = _compile(name, of(layer(_config(shape, execution))), arguments)
    return found


def _rooms(shape: Shape, mesh: Mesh, *, slices: int) -> str | None:
    """The room that a bounded exchange keeps, in words."""
    number = mesh.shape["expert"]
    if number == 1 or number % slices:
        return None
    config = _config(shape, ExecutionConfig(exchange="ragged", slices=slices))
    traffic = exchange.traffic_of(config, 1, shape.tokens, shape.top_k, shards=number)
    sizes = {"width": shape.width, "hidden": shape.hidden, "inputs": shape.activation.inputs}
    return rooms.describe(traffic, **sizes, itemsize=jnp.dtype(shape.dtype).itemsize)


def _arguments(shape: Shape, rows: Any, w_in: Any, w_out: Any) -> tuple[Any, ...]:
    def leaf(sharding: Any, *sizes: int, dtype: Any = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=sharding)

    choices, inputs = (shape.tokens, shape.top_k), shape.activation.inputs
    return (
        leaf(rows, shape.tokens, shape.width),
        leaf(rows, *choices, dtype="int32"),
        leaf(rows, *choices, dtype="float32"),
        ExpertWeights(
            leaf(w_in, shape.num_experts, shape.width, inputs, shape.hidden),
            leaf(w_out, shape.num_experts, shape.hidden, shape.width),
        ),
    )


_HEAD = f"{{:28}}{'Gflop':>10}{'MB':>10}{'temp. MB':>10}{'coll. MB':>10}{'compile s':>10}"


def _compile(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """One line of the table, printed as soon as it is known."""
    start = time.perf_counter()
    try:
        compiled = aot.compile_absent(jax.jit(function).lower(*arguments))
    except Exception as error:  # what a compiler says no to is a finding
        found: dict[str, Any] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        print(f"  {name:26}{found['error']}", flush=True)
        return found
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = aot.text_of(compiled)
    moved = None if text is None else collectives(text)
    found = {
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "temporaries": None if memory is None else memory.temp_size_in_bytes,
        "collectives": moved,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }
    total = None if moved is None else sum(moved.values())
    cells = (found["flops"], 1e9), (found["bytes"], 1e6), (found["temporaries"], 1e6), (total, 1e6)
    line = "".join(f"{'-' if value is None else f'{value / unit:.1f}':>10}" for value, unit in cells)
    print(f"  {name:26}{line}{found['compile_seconds']:>10}", flush=True)
    return found


def collectives(text: str) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled program.

    They are what a device receives, its own part included, but for a ragged exchange: there they are the room
    that is kept, whatever comes.
    """
    total: dict[str, int] = {}
    for line in text.splitlines():
        found = program_text.received(line)
        if found is not None:
            kind, arrays = found
            total[kind] = total.get(kind, 0) + program_text.size_of(arrays)
    return total
