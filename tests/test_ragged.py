"""Exchange in bounded rooms: whatever comes, output and gradients are those of one device."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas import one_at_a_time

from vl_jax import sharding
from vl_jax.fit import program_text
from vl_jax.kernels import aot
from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch, exchange
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.bounded import ragged
from vl_jax.moe.bounded.rooms import Traffic, plan
from vl_jax.moe.config import ExecutionConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import MeshConfig, make_mesh

D, F = 4, 3
TIGHT = {"factor": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of 8 devices and what they choose."""

    tokens: int
    num_experts: int
    choices: int
    load: str
    seed: int

    def draw(self):
        """(x, experts, gates) of all devices, [8 T ...]."""
        random = np.random.default_rng(self.seed)
        shape = (8, self.tokens, self.choices)
        noise = random.random((8, self.tokens, self.num_experts))
        experts = np.argsort(noise, axis=-1)[..., : self.choices].astype(np.int32)
        if self.load == "one expert":
            experts = np.full(shape, self.num_experts, np.int32)
            experts[..., random.integers(self.choices)] = random.integers(self.num_experts)
        elif self.load == "padding":
            experts[:] = self.num_experts
        elif self.load == "one device chooses":
            experts[1:] = self.num_experts
        elif self.load == "sparse":
            experts[random.random(shape) < 0.6] = self.num_experts
        elif self.load == "twice the same":
            experts[..., -1] = experts[..., 0]
        gates = np.where(experts < self.num_experts, random.random(shape, np.float32), np.float32(0))
        return random.standard_normal((8, self.tokens, D), np.float32), experts, gates


def weights_of(num_experts: int) -> ExpertWeights:
    random = np.random.default_rng(1)
    shapes = ((num_experts, D, 2, F), (num_experts, F, D), (num_experts, 2, F), (num_experts, D))
    return ExpertWeights(*(random.standard_normal(shape, np.float32) for shape in shapes))


def slopes_of(shape) -> np.ndarray:
    """What the gradient of the output is."""
    return np.sin(1.0 + np.arange(math.prod(shape), dtype=np.float32)).reshape(shape)


def results(apply, x, experts, gates, weights, slopes):
    """Gradients of x, gates and weights, and the output."""

    def loss(x, gates, weights):
        y = apply(x, TokenChoice(experts, gates), weights)
        return jnp.sum(y * slopes), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, weights)


of_one_device = functools.partial(
    results, functools.partial(dispatch.apply_experts, activation=SWIGLU, kernel="reference")
)
alone = jax.jit(of_one_device)


@jax.jit
def shares(x, experts, gates, weights, slopes):
    """The norm of what the tokens add to each gradient of the weights, were none to cancel another."""
    single = [array.reshape(-1, 1, 1, array.shape[-1]) for array in (x, experts, gates, slopes)]
    (_, _, found), _ = jax.vmap(of_one_device, (0, 0, 0, None, 0))(*single[:3], weights, single[3])
    return jax.tree.map(lambda g: jnp.linalg.norm(jnp.ravel(g)), found)


@functools.cache
def spread(traffic: Traffic, kernel: str = "reference"):
    mesh, rows = Mesh(np.array(jax.devices()[: traffic.shards]), ("expert",)), P("expert")
    local = functools.partial(ragged.apply_experts, activation=SWIGLU, kernel=kernel, traffic=traffic)
    layer = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return jax.jit(functools.partial(results, layer))


def same(found, expected, shares):
    """Equal to 1e-6 of the norm; a sum over tokens, to that of what is summed, for that is rounded."""
    (x, gates, weights), y = jax.tree.map(np.linalg.norm, expected)
    sizes = (x, gates, jax.tree.map(max, weights, shares)), y
    for (path, a), b, size in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), jax.tree.leaves(sizes), strict=True
    ):
        off = np.linalg.norm(np.asarray(a) - b)
        assert off <= 1e-6 * size, f"{jax.tree_util.keystr(path)}: {off}"


LOADS = ("even", "one expert", "padding", "one device chooses", "sparse", "twice the same")
# Rooms: of one hop, with experts side by side and one a device; in chunks; over slices.
LAYERS = {
    "plain": (Case(5, 16, 3, "", 0), {}),
    "tight": (Case(7, 8, 2, "", 0), {"factor": 1.0, "chunks": 1}),
    "chunks": (Case(9, 16, 3, "", 0), {"chunks": 4}),
    "slices": (Case(5, 16, 4, "", 0), {"slices": 2}),
    "slices and chunks": (Case(11, 8, 3, "", 0), {"slices": 4, "chunks": 3, "factor": 1.0}),
    "dynamic": (Case(6, 24, 24, "", 0), {"top_k": 2, "chunks": 2}),
}


def check(name: str, load: str, seed: int, kernel: str = "reference") -> None:
    case, options = LAYERS[name]
    case = dataclasses.replace(case, load=load, seed=seed)
    top_k = options.get("top_k", case.choices)
    options = {"most_choices": case.choices, **options, "top_k": top_k}
    traffic = Traffic(tokens=case.tokens, num_experts=case.num_experts, shards=8, **options)
    x, experts, gates = case.draw()
    arguments = (x, experts, gates, weights_of(case.num_experts), slopes_of(x.shape))
    same(spread(traffic, kernel)(*arguments), alone(*arguments), shares(*arguments))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.slow
def test_whatever_is_chosen_the_result_is_that_of_one_device(load):
    for seed, name in enumerate(LAYERS):
        check(name, load, seed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.sampled_from(LOADS), st.integers(0, 10**6))
@pytest.mark.slow
def test_whatever_is_drawn_the_result_is_that_of_one_device(name, load, seed):
    check(name, load, seed)


@pytest.mark.parametrize(
    ("load", "options"),
    [("even", {"chunks": 3}), ("one device chooses", {"chunks": 1}), ("one expert", {"factor": 1.0})],
)
@pytest.mark.slow
def test_no_more_moves_than_must(monkeypatch, load, options):
    """Forward a row goes there and back; backward it goes again with its gradient, and one comes back."""
    moved = Counter()
    move = ragged._move

    def counted(hop, rows, size, out, come):
        kind = f"{rows.dtype}[{rows.shape[1]}]"
        jax.debug.callback(lambda n: moved.update({kind: int(n)}), jnp.sum(out[1]))
        return move(hop, rows, size, out, come)

    monkeypatch.setattr(ragged, "_move", counted)
    case = Case(12, 16, 3, load, 3)
    x, experts, gates = case.draw()
    traffic = Traffic(tokens=12, top_k=3, num_experts=16, shards=8, **options)
    jax.block_until_ready(spread.__wrapped__(traffic)(x, experts, gates, weights_of(16), slopes_of(x.shape)))
    jax.effects_barrier()
    shard = np.where(experts < 16, experts // 2, 8)
    must = sum(len(set(row) - {8}) for row in shard.reshape(-1, 3).tolist())
    assert moved[f"float32[{D}]"] == 5 * must  # of the four times that cannot be spared: 1.25 times


@pytest.mark.tpu_aot
def test_a_layer_at_pod_scale_fits_and_has_nothing_as_large_as_all_devices():
    """256 experts of DeepSeek-V3's size on 256 chips, 4,096 tokens a chip, forward and backward."""
    tokens, width, hidden, num_experts, top_k = 4096, 7168, 2048, 256, 8
    with one_at_a_time():
        devices = aot.devices("v5p:8x8x4")
        mesh = make_mesh(MeshConfig(expert=len(devices)), devices=devices)
        config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            expert_dim=hidden,
            execution=ExecutionConfig(exchange="ragged"),
        )

        def leaf(*shape, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("expert")))

        def loss(x, gates, weights, experts):
            y = exchange.apply_experts(x, TokenChoice(experts, gates), weights, config)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        rows, choices = (len(devices), tokens, width), (len(devices), tokens, top_k)
        shapes = (num_experts, width, 2, hidden), (num_experts, hidden, width)
        with sharding.use_mesh(mesh):
            lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(
                leaf(*rows),
                leaf(*choices, dtype=jnp.float32),
                ExpertWeights(*(leaf(*shape) for shape in shapes)),
                leaf(*choices, dtype=jnp.int32),
            )
            compiled = aot.compile_absent(lowered)
    balanced = tokens * top_k * width * 2
    assert compiled.memory_analysis().temp_size_in_bytes <= 3 * balanced
    text = lowered.as_text(dialect="hlo")  # jax 0.10 cannot show the compiled one with asynchronous parts
    wide = [shape for kind, shape in received(text) if kind == "ragged-all-to-all" and shape[-1] == width]
    # A round of one of eight chunks: a row goes out twice and comes back twice, and goes out once more.
    traffic = exchange.traffic_of(config, 1, tokens, top_k, shards=len(devices))
    (hop,) = plan(traffic)
    assert set(wide) == {(hop.sent, width), (hop.received, width)}
    assert hop.sent * traffic.num_chunks == tokens * top_k
    assert 2 * sum(map(math.prod, wide)) <= 1.3 * 4 * balanced
    whole = {math.prod(shape) for shape in (rows, choices, *shapes)}  # what the program is given and gives
    arrays = {tuple(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", text)}
    arrays = {shape for shape in arrays if math.prod(shape) not in whole}
    assert max(map(math.prod, arrays)) <= max(hop.received * width, width * 2 * hidden)
    of_devices = {shape for shape in arrays if len(devices) in shape}
    assert max(map(math.prod, of_devices)) <= 2 * len(devices)  # counts


def received(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The collectives of a program and the shapes of their results."""
    found = (program_text.received(f" {line}") for line in text.splitlines())
    return [(one[0], shape) for one in found if one is not None for _, shape in one[1]]
