"""The hybrid encoder: what its parts are, what published weights they take, and what it costs.

How its statistics train is in ``test_joint``, what it gives in ``test_encoder_build``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import folder_in

from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax.ablation.budget import encoder_cost
from vl_jax.encoders.hybrid import RESNET_18, HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.heads.classification import Classification
from vl_jax.interop import parts, rules, vision
from vl_jax.interop.folder import open_weights, read_config
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Layout, Variables, plan_layout
from vl_jax.moe.config import SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import MeshConfig, make_mesh

EXPERTS = MoEConfig(num_experts=4, top_k=2, expert_dim=8, shared=SharedExpertsConfig(num=0))
# As the recordings have it: the trunk a residual network of four stages, of which a grid of 1/16 needs three.
TRUNK = ResNetConfig(
    stem_dim=8, stage_dims=(8, 12, 16, 20), stage_blocks=(2, 2, 2, 2), block="basic", image_size=64
)
HYBRID = HybridConfig(
    trunk=TRUNK,
    embed_dim=24,
    mlp_dim=40,
    num_layers=2,
    num_heads=3,
    activation="gelu",
    pooling="attention",
)


def joint(encoder: Any) -> JointConfig:
    return JointConfig((Tower("image", encoder),), (Classification(("a", "b")),))


@functools.cache
def layout_of(encoder: Any) -> Layout:
    model = joint(encoder)
    return plan_layout(model, model.smallest_batch(1), make_mesh(MeshConfig(), devices=jax.devices()[:1]))


def begun(encoder: Any, named: tuple[tuple[str, str], ...]) -> dict[str, np.ndarray]:
    """The leaves of the encoder, all 0.125 before parts were read, by path below the tower."""
    layout = layout_of(encoder)
    tree = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.125, leaf.dtype), (layout.params, layout.collections)
    )
    found = parts.load(Variables(tree[0], {}, tree[1]), layout, parts.find(layout.model.config, named))
    flat = params_lib.flatten({"params": found.params, **found.collections})
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


def read_alone(folder: Path) -> dict[str, np.ndarray]:
    """A published transformer read by itself."""
    fields, weights = read_config(folder), open_weights(folder)
    config = vision.read_vision(fields)
    kind = fields["model_type"]
    table = vision.vision_rules(kind, source=vision.find_prefix(weights, kind))
    pixels = jnp.zeros((1, *config.input_shape))
    shapes = jax.eval_shape(lambda: config.build("float32").init(jax.random.key(0), pixels))["params"]
    boxed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    flat = {path: getattr(leaf, "value", leaf) for path, leaf in params_lib.flatten(boxed).items()}
    plan = rules.plan(table, {path: leaf.shape for path, leaf in flat.items()})
    tree = rules.read(plan, weights, params_lib.unflatten(flat), ignored=(".*",))
    return {path: np.asarray(leaf) for path, leaf in params_lib.flatten(tree).items()}


def test_a_trunk_ends_where_its_cells_are_as_large_as_the_patches():
    assert HybridConfig().built_trunk.stage_dims == (64, 128, 256) and HybridConfig().grid == 14
    assert HybridConfig().vit.input_shape == (14, 14, 256)
    strided = dataclasses.replace(RESNET_18, first_stage_stride=2)
    assert HybridConfig(trunk=strided).built_trunk.stage_dims == (64, 128)
    assert dataclasses.replace(HYBRID, patch_size=32).built_trunk == TRUNK
    sparse = dataclasses.replace(HYBRID, moe=EXPERTS, sparse_layers=(1,)).stack
    assert sparse is not None and sparse.runs == (("vit", "moe_blocks", "moe"),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patch_size": 14},
            "patch_size=14: no stage of the trunk has cells of that size; they have 4, 8, 16, 32",
        ),
        ({"pooling": "class"}, "pooling='class' needs class_token=True"),
        ({"class_token": True}, "pooling='attention' reads cells alone"),
        ({"num_heads": 5}, "embed_dim=24 is not a multiple of num_heads=5"),
        ({"sparse_layers": (1,)}, "needs moe"),
        ({"moe": dataclasses.replace(EXPERTS, scheme="hash"), "sparse_layers": (1,)}, "routes by token ids"),
    ],
)
def test_a_config_names_what_is_wrong(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HYBRID, **options)


def test_pictures_of_another_size_are_refused():
    module = HYBRID.build("float32")
    with pytest.raises(ValueError, match="images of 96 x 64 pixels: positions are for trunk.image_size=64"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 96, 64, 3), jnp.uint8)))


@pytest.mark.slow
def test_a_published_trunk_sees_what_it_saw_by_itself(oracles: Path):
    folder = folder_in(oracles, "hf", "resnet_basic")
    with np.load(folder / "io.npz") as recorded:
        pixels = np.moveaxis(recorded["in_pixel_values"], 1, -1)
        stages = [np.moveaxis(recorded[f"out_hidden_states.{i}"], 1, -1) for i in (1, 2, 3)]
    encoder = dataclasses.replace(
        HYBRID, trunk=dataclasses.replace(TRUNK, image_size=32), num_layers=1, pooling="mean"
    )
    leaves = begun(encoder, (("image/trunk", str(folder)),))
    own = {path.replace("/image/", "/", 1): leaf for path, leaf in leaves.items() if "/image/" in path}
    tree: Any = params_lib.unflatten(own)
    trunk = {name: tree[name]["trunk"] for name in tree}
    alone = jax.jit(functools.partial(encoder.built_trunk.build("float32").apply, method="stages"))
    for found, expected in zip(alone(trunk, pixels).stages[1:], stages, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    square = pixels[:, :32, :32]
    maps = jax.jit(encoder.build("float32").apply)(tree, square).maps
    assert [grid.shape[1:] for grid in maps] == [(8, 8, 8), (4, 4, 12), (2, 2, 16), (2, 2, 24)]
    for found, expected in zip(maps, alone(trunk, square).stages[1:], strict=False):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.all(leaves["params/image/vit/positions"] == 0.125)  # nobody said where those come from


@pytest.mark.slow
def test_a_published_transformer_goes_behind_the_trunk(oracles: Path):
    folder = folder_in(oracles, "hf", "siglip_vision")
    expected = read_alone(folder)
    found = begun(HYBRID, (("image/vit", str(folder)),))
    own = {path: leaf for path, leaf in found.items() if path.startswith("params/image/vit/")}
    for path, leaf in own.items():
        name = path.removeprefix("params/image/vit/")
        if name.startswith("stem/"):  # the published one sees pixels
            assert np.all(leaf == 0.125)
        else:
            np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert len(own) == len(expected)


@pytest.mark.slow
def test_layers_go_to_their_runs_and_experts_and_routers_begin_afresh(oracles: Path):
    folder = folder_in(oracles, "hf", "siglip_vision")
    expected = read_alone(folder)
    found = begun(dataclasses.replace(HYBRID, moe=EXPERTS, sparse_layers=(0,)), (("image/vit", str(folder)),))
    for name in ("attention/qkv", "norm2/scale"):
        sparse, dense = (found[f"params/image/vit/{run}/{name}"] for run in ("moe_blocks", "blocks"))
        np.testing.assert_array_equal(np.concatenate([sparse, dense]), expected[f"blocks/{name}"])
    assert np.all(found["params/image/vit/moe_blocks/moe/w_in"] == 0.125)


@pytest.mark.slow
def test_positions_are_resized_and_a_class_token_keeps_its_own(oracles: Path):
    folder = folder_in(oracles, "hf", "vit")
    expected = read_alone(folder)["positions"]
    vit = dataclasses.replace(HYBRID, num_heads=4, norm_epsilon=1e-12, class_token=True, pooling="class")
    named = (("image/vit", str(folder)),)
    np.testing.assert_array_equal(begun(vit, named)["params/image/vit/positions"], expected)
    without = dataclasses.replace(vit, class_token=False, pooling="mean")
    np.testing.assert_array_equal(begun(without, named)["params/image/vit/positions"], expected[1:])
    large = dataclasses.replace(vit, trunk=dataclasses.replace(TRUNK, image_size=128))
    found = begun(large, named)["params/image/vit/positions"]
    assert found.shape == (65, 24)
    np.testing.assert_array_equal(found[0], expected[0])
    # Each old cell lies between four new ones, whose mean it is where the table is smooth.
    means = found[1:].reshape(4, 2, 4, 2, -1).mean((1, 3))
    assert np.corrcoef(means.reshape(-1), expected[1:].reshape(-1))[0, 1] > 0.98


@pytest.mark.slow
def test_what_does_not_fit_ends_in_one_line(oracles: Path, tmp_path: Path):
    trunk, vit = (str(folder_in(oracles, "hf", name)) for name in ("resnet_basic", "siglip_vision"))
    broken = tmp_path / "broken"
    shutil.copytree(trunk, broken)
    fields = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**fields, "hidden_sizes": [8, 12, 18, 20]}))
    wide = dataclasses.replace(HYBRID, trunk=dataclasses.replace(TRUNK, stage_dims=(8, 12, 18, 20)))
    bottleneck = dataclasses.replace(HYBRID, trunk=dataclasses.replace(TRUNK, block="bottleneck"))
    deep = dataclasses.replace(HYBRID, num_layers=3)
    for encoder, named, message in (
        (HYBRID, (("image", trunk),), "'image' is no part of the model; there are: image/trunk, image/vit"),
        (HYBRID, (("image/trunk", trunk),) * 2, "'image/trunk' is named twice"),
        (HYBRID, (("image/trunk", str(tmp_path / "none")),), "'image/trunk': no folder"),
        (HYBRID, (("image/trunk", vit),), "holds a 'siglip_vision_model', expected resnet"),
        (
            wide,
            (("image/trunk", trunk),),
            r"has stage_dims=\(8, 12, 18\), .* has \(8, 12, 16, 20\)",
        ),
        (bottleneck, (("image/trunk", trunk),), "has block='bottleneck', the resnet of .* has 'basic'"),
        (deep, (("image/vit", vit),), "has num_layers=3, the siglip_vision_model of .* has 2"),
        (dataclasses.replace(HYBRID, num_heads=4), (("image/vit", vit),), "has num_heads=4, .* has 3"),
        (
            wide,
            (("image/trunk", str(broken)),),
            r"'image/trunk' from .*: params/image/trunk/stage2_first/conv0/conv/kernel: source "
            r"encoder.stages.2.layers.0.layer.0.convolution.weight has shape \(16, 12, 3, 3\), expected "
            r"\(18, 12, 3, 3\) \(and \d+ more\)$",
        ),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            begun(encoder, named)
        assert "\n" not in str(raised.value) and str(raised.value).startswith("config.init_parts: ")


def test_a_whole_tower_can_be_a_part_and_parts_are_named_on_the_command_line(oracles: Path):
    folder = folder_in(oracles, "hf", "siglip_vision")
    encoder = vision.read_vision(read_config(folder))
    found, expected = begun(encoder, (("image", str(folder)),)), read_alone(folder)
    np.testing.assert_array_equal(found["params/image/stem/kernel"], expected["stem/kernel"])
    spec = str(Path(__file__).with_name("tiny_experiment.py"))
    experiment = config_lib.load(spec, [("init_parts", f"(('encoder', {str(folder)!r}),)")])
    with pytest.raises(ValueError, match="'encoder' has embed_dim="):
        parts.find(experiment.model, experiment.init_parts)


@pytest.mark.slow
def test_products_and_parameters_of_an_encoder_are_counted_by_hand():
    side, c = 4, HYBRID
    vit = ViTConfig(image_size=64, patch_size=16, embed_dim=24, mlp_dim=40, num_layers=2, num_heads=3)
    cells = side * side
    block = cells * (4 * 24 * 24 + 2 * 24 * 40) + 2 * cells * cells * 24
    patches = cells * 16 * 16 * 3 * 24
    assert encoder_cost(vit).multiply_adds == patches + 2 * block
    # Two of four experts of width 8, gate and up and down, and a router, in place of the second block's MLP.
    sparse = dataclasses.replace(vit, moe=EXPERTS, sparse_layers=(1,))
    experts = cells * (2 * 3 * 24 * 8 + 24 * 4 - 2 * 24 * 40)
    found, dense = encoder_cost(sparse), encoder_cost(vit)
    assert found.multiply_adds == pytest.approx(patches + 2 * block + experts, rel=0.005)  # and some sorting
    assert found.parameters - found.active_parameters == 2 * 3 * 24 * 8
    assert dense.parameters == dense.active_parameters
    trunk, mean = encoder_cost(c.built_trunk), dataclasses.replace(c, pooling="mean")
    convolutions = 32**2 * 49 * 3 * 8 + 16**2 * 4 * 9 * 8 * 8
    convolutions += 8**2 * (9 * 8 * 12 + 3 * 9 * 12 * 12 + 8 * 12)
    convolutions += 4**2 * (9 * 12 * 16 + 3 * 9 * 16 * 16 + 12 * 16)
    assert trunk.multiply_adds == convolutions
    assert encoder_cost(mean).multiply_adds == convolutions + cells * 16 * 24 + 2 * block


@pytest.mark.slow
def test_at_full_size_the_trunk_costs_less_than_two_blocks():
    whole, trunk = encoder_cost(HybridConfig()), encoder_cost(HybridConfig().built_trunk)
    pure = encoder_cost(
        ViTConfig(image_size=224, patch_size=16, embed_dim=1024, mlp_dim=4096, num_layers=24, num_heads=16)
    )
    block = pure.multiply_adds / 24
    assert trunk.multiply_adds < 2 * block
    assert abs(whole.multiply_adds - pure.multiply_adds - trunk.multiply_adds) < block / 10
