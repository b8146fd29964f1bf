"""Adapters over weights in int8: training sees the weights that int8 stands for, and moves none of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_lora import Batches, Crash, assert_equal, changed, filled, restored
from test_roles import SAM
from test_step import MESHES, ONE, ROWS

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.compress import quantize
from vl_jax.encoders.high_resolution import HighResolution, HighResolutionConfig
from vl_jax.encoders.resnet import ResNet, ResNetConfig
from vl_jax.language.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, StackConfig
from vl_jax.layout import Variables, put_batch
from vl_jax.moe.config import CapacityConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.low_rank import Only
from vl_jax.nn.packed import Packed
from vl_jax.sharding import MeshConfig
from vl_jax.train import initial, lora
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import LoraConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients

pytestmark = pytest.mark.slow  # whole runs with adapters: minutes of compilation

MODEL = tiny.config()
LAYOUT = tiny.layout_of(MODEL)
CONFIG = LoraConfig(
    rank=2, alpha=4.0, targets=("routed", "projector"), only=Only(experts=(0, 3)), base="int8"
)
STAGE = Stage(
    "adapt",
    steps=4,
    batch_size=8,
    trainable=("adapter/newline",),
    lora=CONFIG,
    optimizer=OptimizerConfig(learning_rate=0.02),
)
STACKED = {path for path, placement in LAYOUT.placements.items() if placement.names[:1] == ("layers",)}
INT8 = quantize.select(LAYOUT.params, LAYOUT.roles)


@functools.cache
def found(mesh: MeshConfig = ONE, accumulation: int = 1, small: bool = True) -> dict[str, np.ndarray]:
    """Gradients of filled adapters, and the loss; with weights in int8, or with those that it stands for."""
    layout = tiny.layout_of(MODEL, mesh, devices=int(np.prod(dataclasses.astuple(mesh))))
    params, routing = tiny.build(MODEL)
    params, routing = quantize.quantized(params, INT8, layout.roles), jax.tree.map(np.asarray, routing)
    like = quantize.shapes(layout.params, INT8, layout.roles)
    if not small:
        params, like = quantize.whole(params), layout.params
    params = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), params, like)
    shapes = lora.shapes(CONFIG, layout.params, layout.roles)
    adapters = jax.tree.map(lambda x, s: jax.device_put(np.asarray(x), s.sharding), filled(shapes), shapes)
    state = TrainState(0, params, None, jax.device_put(routing, layout.replicated), adapters)
    batch = put_batch(tiny.varied_batch(ROWS), layout)

    @jax.jit
    def compute(state: TrainState, batch: Any) -> Any:
        grads, metrics, _ = gradients(
            state,
            batch,
            model=layout.model,
            trainable={"adapter/newline"},
            accumulation=accumulation,
            lora_scale=CONFIG.scale,
            lora_only=CONFIG.only,
            roles=layout.roles,
            stacked=STACKED,
        )
        return {**params_lib.flatten(grads), "loss": metrics["loss"]}

    with sharding.use_mesh(layout.mesh, layout.rules):
        return jax.device_get(compute(state, batch))


def assert_alike(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """As in test_lora: all leaves together 1e-5, single ones three times that."""
    assert actual.keys() == expected.keys()
    norm = {path: np.linalg.norm(leaf) for path, leaf in expected.items()}
    error = {path: np.linalg.norm(leaf - actual[path]) for path, leaf in expected.items()}
    assert np.hypot.reduce(list(error.values())) <= 1e-5 * np.hypot.reduce(list(norm.values()))
    assert not {path: (error[path], norm[path]) for path in norm if error[path] > 3e-5 * norm[path]}


def test_gradients_are_those_over_the_weights_that_int8_stands_for():
    assert_alike(found(), found(small=False))
    of_experts = [leaf for path, leaf in found().items() if "/moe/w_in/" in path]
    assert len(of_experts) == 2 and all(leaf.shape[1] == 2 and np.any(leaf) for leaf in of_experts)


def test_eight_devices_and_micro_batches_give_the_same():
    assert_alike(found(MESHES["fsdp2-expert2-tensor2"], 2), found())


def test_small_weights_lie_on_the_mesh_as_the_weights_do():
    layout = tiny.layout_of(MODEL, MESHES["fsdp2-expert2-tensor2"], devices=8)
    shapes = params_lib.flatten(quantize.shapes(layout.params, INT8, layout.roles))
    path = "language/moe_layers/moe/w_in"  # [layers, experts, embed, gate or up, mlp]
    assert tuple(shapes[f"{path}/int8"].sharding.spec) == tuple(layout.placements[path].spec)
    assert tuple(shapes[f"{path}/scale"].sharding.spec) == (None, "expert", None, None, "tensor")
    factors = params_lib.flatten(lora.shapes(CONFIG, layout.params, layout.roles))
    assert tuple(factors[f"{path}/a"].sharding.spec) == (None, None, None, "fsdp", None)


def train(workdir: Path, *, fail_at: int | None = None) -> TrainState:
    return tiny.train(
        LAYOUT,
        (STAGE,),
        lambda stage: Batches(fail_at),
        begin=lambda: Variables(*jax.tree.map(jnp.copy, tiny.build(MODEL))),
        workdir=workdir,
        config=LoopConfig(checkpoint_every=2, keep_checkpoints=9, log_every=1),
        seed=3,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, TrainState]:
    workdir = tmp_path_factory.mktemp("int8")
    return workdir, train(workdir)


def test_training_leaves_the_base_bit_identical_and_ends_in_merged_weights(run, tmp_path):
    workdir, result = run
    last, _ = restored(workdir, tmp_path, 4, (STAGE,))
    begun = quantize.quantized(tiny.build(MODEL)[0], INT8, LAYOUT.roles)
    assert changed(begun, last.params) == {"adapter/newline"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(last.adapters))
    merged = lora.merge(last.params, last.adapters, CONFIG.scale, LAYOUT.roles, CONFIG.only)
    for path, leaf in params_lib.flatten(merged).items():
        np.testing.assert_allclose(params_lib.flatten(result.params)[path], leaf, rtol=1e-5, atol=1e-6)
    assert result.adapters == {}
    # Experts without adapters are what int8 stands for.
    path = "language/moe_layers/moe/w_out"
    found, base = (params_lib.flatten(tree)[path] for tree in (result.params, quantize.whole(last.params)))
    np.testing.assert_allclose(found[:, 1:3], base[:, 1:3], rtol=1e-6)


def test_merged_weights_and_those_kept_apart_say_the_same(run, tmp_path):
    workdir, result = run
    last, _ = restored(workdir, tmp_path, 4, (STAGE,))
    apart = lora.pack(last.params, last.adapters, CONFIG.scale, LAYOUT.roles, CONFIG.only, STACKED)
    batch = tiny.varied_batch(4)
    logits = [tiny.logits(MODEL, batch, params=params) for params in (apart, result.params)]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.max(np.abs(logits[1])), rtol=0)


def test_only_what_trains_has_optimiser_state_and_a_checkpoint_is_small(run, tmp_path):
    state, _ = restored(run[0], tmp_path, 4, (STAGE,))
    trained = params_lib.count(state.adapters) + params_lib.flatten(state.params)["adapter/newline"].size
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim) == 2 * trained
    flat = params_lib.flatten(state.params)
    for path in INT8:
        weight = params_lib.flatten(LAYOUT.params)[path]
        assert flat[f"{path}/int8"].nbytes == weight.size and path not in flat


def test_an_interrupted_run_ends_with_the_same_bits(run, tmp_path):
    with pytest.raises(Crash):
        train(tmp_path / "run", fail_at=3)
    assert_equal(train(tmp_path / "run").params, run[1].params)
    last, whole = (
        restored(w, tmp_path / n, 4, (STAGE,))[0] for w, n in ((tmp_path / "run", "a"), (run[0], "b"))
    )
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_run_begins_with_what_the_weights_and_adapters_stand_for(run):
    origin = initial.find(run[0])
    assert origin is not None
    found = initial.load(origin, LAYOUT, tiny.varied_batch(4), seed=0, lora_of=lambda _: CONFIG).params
    for path, leaf in params_lib.flatten(run[1].params).items():
        np.testing.assert_allclose(params_lib.flatten(found)[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


@functools.cache
def compiled_bytes(base: str) -> tuple[int, int]:
    """Bytes that a compiled step of adapters needs: of its arguments, and besides these."""
    model = dataclasses.replace(
        tiny.of_text(MODEL),
        language=dataclasses.replace(tiny.of_text(MODEL).language, num_layers=6),
        moe=dataclasses.replace(MODEL.moe, num_experts=16, expert_dim=256),
    )
    layout = tiny.layout_of(model)
    stage = dataclasses.replace(
        STAGE, trainable=(), lora=dataclasses.replace(CONFIG, targets=("routed",), base=base)
    )
    program = Program.of(layout, stage)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(4))
    lowered = program.step.lower(program.abstract_state, batch, np.float32(0.1), np.float32(1.0))
    memory = lowered.compile().memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def test_a_step_holds_no_more_than_one_layer_as_floating_point_numbers():
    arguments, besides = compiled_bytes("int8")
    whole, more = compiled_bytes("float")
    assert arguments < 0.35 * whole  # w_in has a scale for every 16 numbers
    assert besides < 0.5 * more


IMAGES = jnp.linspace(0, 255, 32 * 32 * 3).reshape(1, 32, 32, 3)
TWICE = {"encoder": StackConfig(3, (1, 2)), "decoder": StackConfig(2, (1,))}
MODULES: dict[str, tuple[Any, tuple[jax.Array, ...]]] = {
    "resnet": (ResNet(ResNetConfig(stem_dim=4, stage_dims=(8, 12), stage_blocks=(3, 1))), (IMAGES,)),
    "sam": (HighResolution(HighResolutionConfig(SAM, grid=2)), (IMAGES,)),
    "encoder_decoder": (
        EncoderDecoder(
            EncoderDecoderConfig(**TWICE, vocab_size=32, embed_dim=16, mlp_dim=12, num_heads=2, head_dim=6),
            MoEConfig(
                num_experts=3,
                top_k=1,
                expert_dim=12,
                shared=SharedExpertsConfig(0),
                limit=CapacityConfig(slots=2),
            ),
        ),
        (jnp.ones((1, 4), int), jnp.ones((1, 3), int)),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_every_kind_of_stack_puts_its_own_weights_together(name: str):
    module, arguments = MODULES[name]
    boxed = module.init(jax.random.key(0), *arguments)
    places = sharding.place(boxed["params"], LAYOUT.mesh, sharding.AxisRules())
    roles = {path: place.role for path, place in places.items()}
    stacked = {path for path, place in places.items() if place.names[:1] == ("layers",)}
    variables = nn.meta.unbox(boxed)
    small = quantize.quantized(variables["params"], quantize.select(variables["params"], roles), roles)
    packed = lora.pack(small, {}, 1.0, roles, stacked=stacked)
    kept = [leaf for leaf in params_lib.flatten(packed).values() if isinstance(leaf, Packed)]
    assert kept
    apply = jax.jit(lambda params: module.apply({**variables, "params": params}, *arguments))
    found, expected = apply(packed), apply(quantize.whole(small))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
