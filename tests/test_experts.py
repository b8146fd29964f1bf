"""Training of some experts alone: what belongs to the others keeps its bits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Given
from vl_jax.encoders.vit import ViTConfig
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Variables, plan_layout, put_batch
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.stacks import init_state
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.lora import LoraConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.program import Program
from vl_jax.train.specialise import chosen as experts
from vl_jax.train.stages import Stage, expert_masks, trainable_table

ROWS, E = 4, 5
MOE = MoEConfig(
    scheme="loss_free",
    num_experts=E,
    top_k=2,
    expert_dim=6,
    shared=SharedExpertsConfig(num=0),
    expert_bias=True,
    router_bias=True,
    balance=BalanceConfig(bias_rate=0.05),
)
ENCODER = ViTConfig(
    image_size=16,
    patch_size=8,
    embed_dim=8,
    mlp_dim=12,
    num_layers=3,
    num_heads=2,
    moe=MOE,
    sparse_layers=(0, 1),
)
MODEL = JointConfig((Tower("image", ENCODER),), (Classification(("a", "b")),))
OWN = (r"image/moe_blocks/moe/.*",)


@functools.cache
def layout_of(model: JointConfig = MODEL):
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    return plan_layout(model, model.smallest_batch(1), mesh)


def stage(**options) -> Stage:
    rate = OptimizerConfig(learning_rate=0.1, schedule="constant", method=options.pop("method", "adamw"))
    options = {"trainable": OWN, "experts": (1, 4), "batch_size": ROWS, **options}
    return Stage("specialise", steps=3, objective=Heads(), optimizer=rate, **options)


def batch():
    random = np.random.default_rng(0)
    rows = jax.tree.map(lambda x: np.repeat(x, ROWS, axis=0), MODEL.smallest_batch(1))
    return dataclasses.replace(
        rows,
        tiles=random.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
        visual_index=np.tile(np.arange(4, dtype=np.int32), (ROWS, 1)),
        labels={"label": Given(random.integers(0, 2, ROWS).astype(np.int32), np.ones(ROWS, bool))},
    )


def trained(one: Stage):
    """(parameters and routing before, after two steps with adapters merged)."""
    layout = layout_of()
    random = np.random.default_rng(1)

    def draw(path, leaf):
        values = random.standard_normal(leaf.shape).astype(np.float32)
        return jax.device_put(np.where(values > 1.5, -0.0, values), leaf.sharding)

    params = params_lib.map_paths(draw, layout.params)
    routing = jax.device_put(init_state(MODEL.stacks), layout.replicated)
    before = jax.device_get((params, routing))
    program = Program.of(layout, one)
    state = program.begin(Variables(params, routing), jax.random.key(0))
    with sharding.use_mesh(layout.mesh, layout.rules):
        for _ in range(2):
            state, metrics = program.step(state, put_batch(batch(), layout), np.float32(0.1), np.float32(1e9))
        assert float(metrics["grad_norm"]) > 0
        after = program.merge(state)
    return before, jax.device_get((after.params, after.routing))


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"method": "adamw"},
        {"method": "muon"},
        {"accumulation": 2},
        {"trainable": (), "lora": LoraConfig(rank=2, targets=(r"image/moe_blocks/moe/w_.*",))},
    ],
    ids=["adamw", "muon", "accumulation", "lora"],
)
def test_the_other_experts_keep_their_bits(options):
    (old, old_state), (new, new_state) = trained(stage(**options))
    lone = "lora" in options
    old, new = params_lib.flatten(old), params_lib.flatten(new)
    axes = {"w_in": 1, "w_out": 1, "b_in": 1, "b_out": 1, "router": -1, "router_bias": -1}
    for path, value in new.items():
        name = path.rpartition("/")[2]
        if "/moe/" not in path or (lone and not name.startswith("w_")):
            np.testing.assert_array_equal(bits(value), bits(old[path]), err_msg=path)
            continue
        for number in range(E):
            was, now = (np.take(x, number, axes[name]) for x in (old[path], value))
            if not lone:  # merging adapters adds zero, which makes minus zero a zero
                was, now = bits(was), bits(now)
            assert np.array_equal(was, now) == (number not in (1, 4)), (path, number)
    moved = new_state["image"]["bias"] != old_state["image"]["bias"]
    assert not moved[:, [0, 2, 3]].any() and moved[:, [1, 4]].any()


def test_the_table_counts_the_parameters_of_the_chosen_experts():
    layout = layout_of()
    rows = {row[0]: row[1:] for row in trainable_table(stage(), layout.params, layout.roles, MODEL.stacks)}
    shapes = {k: v.shape for k, v in params_lib.flatten(layout.params).items() if "/moe/" in k}
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    whole, trains = rows["image/moe_blocks"]
    assert trains == total * 2 // E < whole
    assert rows["image/blocks"][1] == 0


def test_without_chosen_experts_there_is_no_mask():
    layout = layout_of()
    assert not expert_masks(stage(experts=()), layout.params, layout.roles, MODEL.stacks)
    tree = {"a": np.ones(2)}
    assert experts.cut(tree, {}, 0.0) is tree


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"experts": (1, 5)},
            "config.stages.specialise.experts: 5 is no expert of image; expected .* 0 to 4",
        ),
        ({"experts": (-1,)}, "experts: -1 is no expert of image"),
        ({"trainable": ("label/.*",)}, r"experts: \(1, 4\): nothing that trains belongs to an expert"),
    ],
)
def test_experts_that_there_are_not_are_refused(options, message):
    layout = layout_of()
    with pytest.raises(ValueError, match=message):
        expert_masks(stage(**options), layout.params, layout.roles, MODEL.stacks)


def test_a_model_without_experts_has_none_to_choose():
    encoder = dataclasses.replace(ENCODER, moe=None, sparse_layers=())
    layout = layout_of(dataclasses.replace(MODEL, towers=(Tower("image", encoder),)))
    with pytest.raises(ValueError, match=r"experts: \(1, 4\): the model has no routed experts"):
        expert_masks(stage(trainable=(".*",)), layout.params, layout.roles, {})


def test_an_expert_is_named_once():
    with pytest.raises(ValueError, match=r"experts=\(1, 1\) names an expert twice"):
        stage(experts=(1, 1))
