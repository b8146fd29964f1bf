"""How long routed experts take, from assignment to combined output, beside the other ways to compute them.

    x [T D], experts [T K], gates [T K], weights --ways: ours, capacity, one-hot, ragged, ...--> y [T D]

All ways run in turns in this process on the same numbers, and ratios are of neighbouring turns. Ways that
need a capacity (factor 1.25) drop what overflows, so that they do no more work than the others. Those whose
memory a machine may not have (``MOST_BYTES``) or that it cannot run are named with the reason. Last in the
table is no rival, but the floor.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.benchmarks.step import machine
from vl_jax.kernels import target
from vl_jax.kernels.activation import Activation
from vl_jax.kernels.combine import combine
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.permute import permute
from vl_jax.moe import all_to_all, dispatch
from vl_jax.moe.routing import TokenChoice
from vl_jax.moe.slots import as_fraction, ceil_times
from vl_jax.runtime import allocator

CAPACITY_FACTOR = 1.25
MOST_BYTES = 4 << 30  # of a way's largest intermediate
ONE_HOT_GROUP = 512  # tokens that share the slots of a one-hot dispatch (GShard)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one layer."""

    tokens: int = 8192  # of one device
    width: int = 512
    hidden: int = 352  # width of an expert
    num_experts: int = 64
    top_k: int = 6
    gated: bool = False  # SwiGLU, with three matrices instead of two
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("tokens", "width", "hidden", "num_experts", "top_k"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be at most num_experts={self.num_experts}")

    @property
    def activation(self) -> Activation:
        return Activation("silu", gated=self.gated)

    @property
    def flops(self) -> int:
        """Of the matrix products of a forward pass, with nothing padded."""
        return 2 * self.tokens * self.top_k * self.width * self.hidden * (3 if self.gated else 2)

    def __str__(self) -> str:
        kind = "SwiGLU" if self.gated else "two matrices"
        return (
            f"T={self.tokens} d={self.width} F={self.hidden} E={self.num_experts} k={self.top_k}, "
            f"{kind}, {self.dtype}"
        )


# The layers that are measured when nothing else is asked for: on a CPU, and on an accelerator.
CPU_SHAPES = tuple(Shape(num_experts=e) for e in (16, 64, 256))
ACCELERATOR_SHAPES = (Shape(16384, 2048, 1408, 64, 6, gated=True, dtype="bfloat16"),)


def shape_of(given: Mapping[str, Any], *, platform: str) -> Shape | None:
    """The layer that some sizes ask for, all others as by default there; None if nothing is asked for.

    Raises:
      ValueError: a size that there is not.
    """
    default = Shape() if platform == "cpu" else ACCELERATOR_SHAPES[0]
    asked = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(default, **asked) if asked else None


Inputs = tuple[jax.Array, jax.Array, jax.Array, ExpertWeights]  # x, experts, gates, weights
Way = Callable[[jax.Array, jax.Array, jax.Array, ExpertWeights], jax.Array]


def draw(shape: Shape, *, load: str = "balanced", seed: int = 0) -> Inputs:
    """Random inputs.

    Args:
      load: ``balanced``, every expert as likely; or ``zipf``, expert e in proportion to 1 / (e + 1).
    """
    random = np.random.default_rng(seed)
    chance = np.ones(shape.num_experts) if load == "balanced" else 1 / np.arange(1, shape.num_experts + 1)
    # The K highest of log-probabilities with Gumbel noise are drawn without replacement.
    noisy = np.log(chance) + random.gumbel(size=(shape.tokens, shape.num_experts))
    experts = np.argsort(-noisy, axis=-1)[:, : shape.top_k].astype(np.int32)
    dtype, inputs = jnp.dtype(shape.dtype), shape.activation.inputs

    def normal(*sizes: int, scale: float) -> jax.Array:
        return jnp.asarray(scale * random.standard_normal(sizes, np.float32), dtype)

    weights = ExpertWeights(
        normal(shape.num_experts, shape.width, inputs, shape.hidden, scale=shape.width**-0.5),
        normal(shape.num_experts, shape.hidden, shape.width, scale=shape.hidden**-0.5),
    )
    gates = jnp.asarray(random.dirichlet(np.ones(shape.top_k), shape.tokens), jnp.float32)
    return normal(shape.tokens, shape.width, scale=1.0), jnp.asarray(experts), gates, weights


def ours(shape: Shape, kernel: str) -> Way:
    """The layer as it is trained: sorted rows, each group through its own expert."""

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        assignment = TokenChoice(experts[None], gates[None])
        options = {"activation": shape.activation, "kernel": kernel}
        return dispatch.apply_experts(x[None], assignment, weights, **options)[0]

    return run


def slots_of(shape: Shape, tokens: int) -> int:
    """Slots per expert for so many tokens, as in a layer with this factor."""
    share = as_fraction(CAPACITY_FACTOR) * shape.top_k / shape.num_experts
    return ceil_times(tokens, share, most=tokens)


def capacity_buffer(shape: Shape) -> Way:
    """Rows gathered into E buffers of equal size, and a batched product."""
    slots = slots_of(shape, shape.tokens)

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        plan = all_to_all.make_slots(experts[None], num_experts=shape.num_experts, slots=slots)
        rows = all_to_all.to_slots(x, plan).reshape(shape.num_experts, slots, -1)
        w_in = weights.w_in.reshape(*weights.w_in.shape[:2], -1)
        out = shape.activation(jnp.einsum("ECD,EDF->ECF", rows, w_in))
        out = jnp.einsum("ECF,EFD->ECD", out, weights.w_out)
        return all_to_all.from_slots(out.reshape(-1, shape.width), gates, plan)

    return run


def one_hot(shape: Shape) -> Way:
    """One-hot matrices move the rows, for one group of tokens at a time (GShard, arXiv 2006.16668)."""
    group = min(ONE_HOT_GROUP, shape.tokens)
    slots = slots_of(shape, group)

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        w_in = weights.w_in.reshape(*weights.w_in.shape[:2], -1)

        def one_group(x: jax.Array, experts: jax.Array, gates: jax.Array) -> jax.Array:
            rank = dispatch.rank_by_sorting(experts.reshape(-1), shape.num_experts).reshape(experts.shape)
            place = jax.nn.one_hot(experts, shape.num_experts, dtype=x.dtype)[..., None]
            place = place * jax.nn.one_hot(rank, slots, dtype=x.dtype)[..., None, :]  # [t K E C]
            rows = jnp.einsum("TKEC,TD->ECD", place, x)
            out = shape.activation(jnp.einsum("ECD,EDF->ECF", rows, w_in))
            out = jnp.einsum("ECF,EFD->ECD", out, weights.w_out)
            return jnp.einsum("TKEC,TK,ECD->TD", place, gates.astype(x.dtype), out)

        split = (a.reshape(-1, group, *a.shape[1:]) for a in (x, experts, gates))
        return jax.lax.map(lambda parts: one_group(*parts), tuple(split)).reshape(x.shape)

    return run


def sorted_rows(shape: Shape, product: Callable[..., jax.Array]) -> Way:
    """Sorted rows and a grouped product of a library: (rows, matrices, rows of every matrix) -> rows."""

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        assignment = TokenChoice(experts[None], gates[None])
        plan = dispatch.make_plan(assignment, num_experts=shape.num_experts)
        w_in = weights.w_in.reshape(*weights.w_in.shape[:2], -1)
        hidden = shape.activation(product(permute(x, plan.moves), w_in, plan.group_sizes))
        rows = product(hidden, weights.w_out, plan.group_sizes)
        return combine(rows, gates, plan.choice, plan.moves)

    return run


def one_expert(shape: Shape) -> Way:
    """No routing: as many rows through one expert. How fast the device multiplies what others multiply."""

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        rows = jnp.tile(x, (shape.top_k, 1))
        hidden = shape.activation(rows @ weights.w_in[0].reshape(shape.width, -1))
        out = (hidden @ weights.w_out[0]).reshape(shape.top_k, *x.shape)
        return jnp.einsum("KTD,TK->TD", out, gates.astype(x.dtype))

    return run


def _megablox(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm  # it warns where there is no TPU

    return gmm(rows, matrices, sizes, preferred_element_type=rows.dtype)


def _tokamax(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.ragged_dot(rows, matrices, sizes)


def ways(shape: Shape, *, platform: str) -> dict[str, Way]:
    """What can be measured on a platform; ours is the first."""
    reasons = left_out(shape, platform=platform)
    kernel = target.choose("auto", shape.width, shape.hidden)
    result = {f"ours, {kernel}": ours(shape, kernel), "capacity buffer": capacity_buffer(shape)}
    if kernel != "blocked":
        result["ours, blocked"] = ours(shape, "blocked")
    if platform == "cpu":
        result["every expert on every row"] = ours(shape, "reference")
    result["one-hot products"] = one_hot(shape)
    result["lax.ragged_dot"] = sorted_rows(shape, jax.lax.ragged_dot)
    if platform == "tpu":
        result["megablox"] = sorted_rows(shape, _megablox)
    if platform != "cpu":
        result["tokamax"] = sorted_rows(shape, _tokamax)
    return {name: way for name, way in result.items() if name not in reasons}


def left_out(shape: Shape, *, platform: str) -> dict[str, str]:
    """The ways that are not measured, and why."""
    rows = shape.tokens * shape.top_k * shape.width * jnp.dtype(shape.dtype).itemsize
    group = min(ONE_HOT_GROUP, shape.tokens)
    one_hot_size = group * shape.top_k * CAPACITY_FACTOR * group * shape.top_k * 4
    reasons = {}
    if platform == "cpu" and shape.num_experts > 16:
        reasons["every expert on every row"] = f"{shape.num_experts / shape.top_k:.0f} times the work"
    if one_hot_size >= MOST_BYTES:
        reasons["one-hot products"] = f"needs {one_hot_size / 1e9:.1f} GB"
    elif shape.tokens % group:
        reasons["one-hot products"] = f"{shape.tokens} tokens are not groups of {group}"
    # Only on a TPU does it not multiply every row by every expert, and keep all of that.
    if platform != "tpu" and rows * shape.num_experts >= MOST_BYTES:
        reasons["lax.ragged_dot"] = f"needs {rows * shape.num_experts / 1e9:.1f} GB"
    if platform != "tpu":
        reasons["megablox"] = "is for TPUs"
    if platform == "cpu":
        reasons["tokamax"] = "is for accelerators"
    elif importlib.util.find_spec("tokamax") is None:
        reasons["tokamax"] = "is not installed"
    return reasons


def forward_backward(way: Way) -> Callable[..., Any]:
    """Gradients of input, gates and weights."""

    def run(x: jax.Array, experts: jax.Array, gates: jax.Array, weights: ExpertWeights) -> Any:
        def objective(x: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
            return jnp.sum(way(x, experts, gates, weights).astype(jnp.float32) ** 2)

        return jax.grad(objective, argnums=(0, 1, 2))(x, gates, weights)

    return run


LOADS = ("balanced", "zipf")
MODES = {"forward": lambda way: way, "forward + backward": forward_backward}


def run(*, repeats: int = 5, json_file: Path | None = None, shapes: tuple[Shape, ...] = ()) -> dict[str, Any]:
    """Measures on the first device here, prints tables, and returns the figures.

    Raises:
      ValueError: there are no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    allocator.keep_freed_memory(one_heap=True)  # experts of a layer are larger than a thread's heap keeps
    platform = jax.default_backend()
    result: dict[str, Any] = {"benchmark": "routing", "repeats": repeats, "machine": machine(), "layers": []}
    for shape in shapes or (CPU_SHAPES if platform == "cpu" else ACCELERATOR_SHAPES):
        for load in LOADS:
            inputs = draw(shape, load=load)
            entry: dict[str, Any] = {"shape": dataclasses.asdict(shape), "load": load, "modes": {}}
            entry["not_run"] = left_out(shape, platform=platform)
            print(f"\n{shape}, {load}")
            for mode, of in MODES.items():
                timed = {**ways(shape, platform=platform), "no routing, one expert": one_expert(shape)}
                functions = {name: jax.jit(of(way)) for name, way in timed.items()}
                entry["modes"][mode] = figures = measure(functions, inputs, repeats)
                print(table(mode, figures))
            for name, reason in entry["not_run"].items():
                print(f"  {name:26}not run: {reason}")
            result["layers"].append(entry)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def measure(
    functions: Mapping[str, Callable[..., Any]], inputs: Inputs, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of wall and CPU time of every function in turns, and the ratio of its CPU time to the first's.

    Where an accelerator computes, the ratio is of wall time.
    """
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(repeats + 1):  # the first compiles
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function(*inputs))
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if turn:
                turns[name].append(spent)
    clock = 1 if jax.default_backend() == "cpu" else 0
    first = next(iter(turns.values()))
    return {
        name: {
            "wall": statistics.median(w for w, _ in spent),
            "cpu": statistics.median(c for _, c in spent),
            "ratio": statistics.median(a[clock] / b[clock] for a, b in zip(spent, first, strict=True)),
        }
        for name, spent in turns.items()
    }


def table(mode: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """The figures as text."""
    lines = [f"{mode:28}{'wall ms':>10}{'CPU ms':>10}{'ratio':>8}"]
    lines += [
        f"  {name:26}{1e3 * f['wall']:10.1f}{1e3 * f['cpu']:10.1f}{f['ratio']:8.2f}"
        for name, f in figures.items()
    ]
    return "\n".join(lines)
