"""Encoders by their configs: one interface, any of them in the model, sparse blocks in the transformer."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.batch import TEXT, VISION
from vl_jax.encoders.build import NEEDS, EncoderConfig
from vl_jax.encoders.deformable_front import DeformableFrontConfig
from vl_jax.encoders.high_resolution import HighResolutionConfig
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import MOMENTUM, ResNetConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.swin_hybrid import SwinHybridConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig
from vl_jax.encoders.vit import ViTConfig, normalize
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.model import ENCODER, LANGUAGE, VisionLanguageConfig, used_tiles
from vl_jax.moe import stacks
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.schema import ConfigError

EXPERIMENT = str(Path(__file__).with_name("tiny_experiment.py"))
MOE = MoEConfig(
    scheme="loss_free",
    num_experts=4,
    top_k=2,
    expert_dim=8,
    shared=SharedExpertsConfig(num=1),
    balance=BalanceConfig(weight=0.01),
)
VIT = ViTConfig(image_size=8, patch_size=2, embed_dim=16, mlp_dim=32, num_layers=4, num_heads=2)
SPARSE = dataclasses.replace(VIT, moe=MOE, sparse_layers=(1, 3))
SAM = SAMConfig(
    image_size=8,
    patch_size=2,
    embed_dim=8,
    mlp_dim=16,
    output_dim=6,
    num_layers=2,
    num_heads=2,
    window=2,
    global_layers=(1,),
)
RESNET = ResNetConfig(stem_dim=4, stage_dims=(8, 12), stage_blocks=(2, 1), image_size=16)
TEXTS = TextEncoderConfig(
    vocab_size=20, max_length=6, embed_dim=8, mlp_dim=16, num_layers=2, num_heads=2, end_id=19
)
HYBRID = HybridConfig(
    trunk=dataclasses.replace(RESNET, block="basic", stage_dims=(8, 12, 16), stage_blocks=(2, 1, 1)),
    patch_size=4,
    embed_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    moe=MOE,
    sparse_layers=(1,),
)
SWIN = SwinConfig(
    image_size=16, patch_size=2, embed_dim=6, stage_blocks=(2, 1), num_heads=(2, 3), window=4, mlp_ratio=2.0
)
VIDEOMAE = VideoMAEConfig(
    image_size=(8, 12), num_frames=4, patch_size=4, embed_dim=8, mlp_dim=16, num_layers=1, num_heads=2
)
VIDEO_RESNET = VideoResNetConfig(
    image_size=8,
    num_frames=4,
    num_channels=1,
    stem_dim=4,
    stage_dims=(4, 6),
    stage_blocks=(1, 2),
    pixel_mean=0.5,
    pixel_std=0.5,
)
POOLED = dataclasses.replace(
    VIT, class_token=True, pooling="class", projection_dim=5, feature_layers=(-1, 0), num_layers=2
)
KINDS: dict[str, EncoderConfig] = {
    "vit": dataclasses.replace(VIT, num_layers=2),
    "vit_pooled": POOLED,
    "vit_sparse": SPARSE,
    "sam": SAM,
    "resnet": RESNET,
    "hybrid": dataclasses.replace(
        HYBRID, moe=None, sparse_layers=(), patch_size=8, class_token=True, pooling="class"
    ),
    "hybrid_sparse": HYBRID,
    "swin": SWIN,
    "swin_hybrid": SwinHybridConfig(RESNET, 8, 6, (2, 1), (2, 3), window=2),
    "deformable_vit": DeformableFrontConfig(dataclasses.replace(VIT, num_layers=1), features=4),
    "deformable_sparse": DeformableFrontConfig(SPARSE, features=4, form="gather"),
    "videomae": VIDEOMAE,
    "video_resnet": VIDEO_RESNET,
    "high_resolution": HighResolutionConfig(SAM, grid=2),
    "text": TEXTS,
    "text_sparse": dataclasses.replace(TEXTS, moe=MOE, sparse_layers=(0,)),
}


def inputs_of(config: EncoderConfig, count: int = 2, seed: int = 0) -> jax.Array:
    random, shape = np.random.default_rng(seed), (count, *config.input_shape)
    if len(config.input_shape) == 1:
        return jnp.asarray(random.integers(0, 20, shape), jnp.int32)
    return jnp.asarray(random.integers(0, 256, shape), jnp.uint8)


def state_of(config: EncoderConfig) -> Any:
    return stacks.init_state({ENCODER: config.stack})[ENCODER] if config.stack is not None else None


def init(config: EncoderConfig) -> Any:
    run = jax.jit(functools.partial(config.build("float32").init, routing_state=state_of(config)))
    return nn.meta.unbox(run(jax.random.key(0), inputs_of(config)))


@functools.cache
def sparse_variables(config: EncoderConfig = SPARSE) -> Any:
    return init(config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_every_kind_gives_the_tokens_that_its_config_says(kind: str):
    config = KINDS[kind]
    assert all(hasattr(type(config), need) for need in NEEDS)
    inputs, state = inputs_of(config), state_of(config)

    def run() -> Any:
        module = config.build(jnp.bfloat16, remat=True)
        return module.init_with_output(jax.random.key(0), inputs, None, state)[0]

    encoded = jax.eval_shape(run)
    assert encoded.tokens.shape == (2, config.num_tokens, config.output_dim)
    assert encoded.tokens.dtype == jnp.bfloat16
    maps = {
        "resnet": [4, 2],
        "hybrid": [4, 2, 2],
        "hybrid_sparse": [4, 4],
        "swin": [8, 4],
        "swin_hybrid": [4, 2, 1],
    }
    assert [grid.shape[1] for grid in encoded.maps] == maps.get(kind, [])
    pooled = {"vit_pooled": 5, "text": 512, "text_sparse": 512}
    pooled |= dict.fromkeys(("vit", "vit_sparse", "deformable_vit", "deformable_sparse"))
    width = pooled.get(kind, config.output_dim)
    assert (encoded.pooled is None) if width is None else encoded.pooled.shape == (2, width)
    assert (encoded.routed is not None) == (config.stack is not None) == kind.endswith("sparse")
    if len(config.input_shape) == 3:
        assert config.grid**2 == config.num_tokens
    else:
        with pytest.raises(ValueError, match="form no square"):
            _ = config.grid


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_read_again(kind: str):
    reads = {1: "tokens", 3: "tiles", 4: "clip"}[len(KINDS[kind].input_shape)]
    model = JointConfig((Tower("eye", KINDS[kind], reads),), (Classification(("a", "b"), stream="eye"),))
    assert schema.from_json(schema.to_json(model), JointConfig) == model


@pytest.mark.parametrize("kind", ["videomae", "video_resnet"])
@pytest.mark.slow
def test_clips_are_an_input_of_a_joint_model(kind: str):
    model = JointConfig((Tower("eye", KINDS[kind], "clip"),), (Classification(("a", "b"), stream="eye"),))
    batch = model.smallest_batch(2)
    output, _ = jax.eval_shape(
        lambda: model.build().init_with_output(jax.random.key(0), jax.tree.map(jnp.asarray, batch), {})
    )
    stream = output.streams["eye"]
    assert stream.tokens.shape == (2, KINDS[kind].num_tokens, KINDS[kind].output_dim)
    assert stream.mask.shape == stream.tokens.shape[:2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "resnet"])
def test_grey_levels_are_normalised_by_the_config_and_cells_stand_row_by_row(kind: str):
    config: Any = KINDS[kind]
    variables, pixels, module = init(config), inputs_of(config), config.build("float32")
    call = jax.jit(module.apply)
    encoded: Any = call(variables, pixels)
    floats = normalize(pixels, mean=config.pixel_mean, std=config.pixel_std)
    np.testing.assert_allclose(call(variables, floats).tokens, encoded.tokens, rtol=1e-5, atol=1e-5)
    output: Any = jax.jit(functools.partial(module.apply, method="stages"))(variables, pixels)
    grid = output.features if kind == "sam" else output.stages[-1]
    side = config.grid
    np.testing.assert_allclose(
        encoded.tokens.reshape(2, side, side, -1)[:, 0, 1], grid[:, 0, 1], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(encoded.pooled, grid.mean((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_moving_statistics_count_used_images_alone_and_stand_still_in_evaluation():
    config = dataclasses.replace(RESNET, statistics="moving")
    variables, pixels = init(config), inputs_of(config, 3)
    module = config.build("float32", remat=True)

    @jax.jit
    def train(pixels: Any, valid: Any) -> Any:
        return module.apply(variables, pixels, valid, mutable=["batch_stats"])

    encoded, changed = train(pixels, jnp.array([True, False, True]))
    alone, expected = train(pixels[jnp.array([0, 2, 0])], jnp.array([True, True, False]))
    np.testing.assert_allclose(encoded.tokens[2], alone.tokens[1], rtol=1e-4, atol=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), changed, expected)
    before, after = (params_lib.flatten(t["batch_stats"]) for t in (variables, changed))
    assert all(np.any(before[path] != after[path]) for path in before)
    assert np.all(after["stem/norm/variance"] >= MOMENTUM)
    _, none = train(pixels, jnp.zeros(3, bool))
    jax.tree.map(np.testing.assert_array_equal, none["batch_stats"], variables["batch_stats"])
    frozen = RESNET.build("float32").apply(variables, pixels)
    np.testing.assert_allclose(module.apply(variables, pixels).tokens, frozen.tokens, rtol=1e-5, atol=1e-5)


# Sparse blocks.


@pytest.mark.slow
def test_runs_of_one_kind_share_a_name_and_a_sparse_one_has_experts_for_its_projections():
    names = [run.name for run in SPARSE.block.runs]
    assert names == ["blocks", "moe_blocks", "blocks_1", "moe_blocks_1"]
    assert [run.name for run in VIT.block.runs] == ["blocks"]
    stack = SPARSE.stack
    assert stack is not None and stack.layers == (1, 3)
    assert stack.runs == (("moe_blocks", "moe"), ("moe_blocks_1", "moe"))
    params = sparse_variables()["params"]
    assert set(params["blocks"]) == {"attention", "norm1", "norm2", "fc1", "fc2"}
    assert set(params["moe_blocks_1"]) == {"attention", "norm1", "norm2", "moe"}
    assert params["moe_blocks"]["moe"]["w_in"].shape == (1, 4, 16, 2, 8)


@pytest.mark.slow
def test_hidden_states_count_all_blocks_wherever_runs_end():
    config = dataclasses.replace(SPARSE, feature_layers=(0, 1, 2, 3, 4))
    encoded: Any = jax.jit(config.build("float32").apply)(
        sparse_variables(), inputs_of(config), None, state_of(config)
    )
    assert len(encoded.states) == 5 and encoded.tokens.shape == (2, 16, 80)
    apart = [np.abs(a - b).max() for a, b in zip(encoded.states, encoded.states[1:], strict=False)]
    assert min(apart) > 1e-3
    last: Any = dataclasses.replace(SPARSE, feature_layers=(-1,)).build("float32")
    found = jax.jit(last.apply)(sparse_variables(), inputs_of(config), None, state_of(config))
    np.testing.assert_allclose(found.tokens, encoded.states[4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [SPARSE, HYBRID], ids=["vit", "hybrid"])
@pytest.mark.parametrize("given", [None, [True, False, True]])
@pytest.mark.slow
def test_every_patch_of_a_used_image_is_counted_once_and_none_of_others(config: Any, given: Any):
    pixels = inputs_of(config, 3)
    valid = None if given is None else jnp.array(given)
    variables, state, layers = sparse_variables(config), state_of(config), len(config.sparse_layers)
    encoded: Any = jax.jit(config.build("float32").apply)(variables, pixels, valid, state)
    images = 3 if given is None else 2
    stats = encoded.routed.stats
    np.testing.assert_array_equal(stats.tokens[:, VISION], [images * 16] * layers)
    np.testing.assert_array_equal(stats.load[:, VISION].sum(-1), [images * 16 * 2] * layers)
    assert not np.any(stats.tokens[:, TEXT]) and not np.any(stats.load[:, TEXT])
    assert all(loss.shape == (layers,) for loss in encoded.routed.losses.values())
    # Tokens stand where their cells are: the last map is the tokens, and no map mixes pictures.
    for grid in encoded.maps:
        assert grid.shape[0] == 3 and grid.shape[1] == grid.shape[2]
    if encoded.maps:
        np.testing.assert_array_equal(encoded.maps[-1].reshape(3, 16, -1), encoded.tokens)


@pytest.mark.slow
def test_texts_count_as_text_and_padding_not_at_all():
    config: Any = KINDS["text_sparse"]
    valid = jnp.arange(6) < jnp.array([[4], [6]])
    encoded: Any = jax.jit(config.build("float32").apply)(
        init(config), inputs_of(config), valid, state_of(config)
    )
    np.testing.assert_array_equal(encoded.routed.stats.tokens, [[10, 0]])


@pytest.mark.slow
def test_each_sparse_block_has_its_own_state():
    state = state_of(SPARSE)
    moved = {"bias": state["bias"].at[1, 3].set(100.0)}  # everyone to the last expert, in the second only
    encoded: Any = jax.jit(SPARSE.build("float32").apply)(sparse_variables(), inputs_of(SPARSE), None, moved)
    load = encoded.routed.stats.load[:, VISION, 3]
    assert load[0] < 32 and load[1] == 32


@pytest.mark.slow
def test_noise_differs_between_sparse_blocks_and_only_with_a_key():
    config = dataclasses.replace(
        SPARSE, moe=dataclasses.replace(MOE, scheme="noisy_top_k"), sparse_layers=(0, 1)
    )
    variables, pixels, module = init(config), inputs_of(config), config.build("float32")

    @jax.jit
    def run(rngs: Any) -> Any:
        _, seen = module.apply(variables, pixels, rngs=rngs, mutable=["intermediates"])
        return seen["intermediates"]["moe_blocks"]["moe"]["assignment"][0].gates

    quiet, loud = run({}), run({"routing": jax.random.key(1)})
    assert quiet.shape[0] == 2 and np.all(np.any(loud != quiet, axis=(1, 2, 3)))


@pytest.mark.slow
def test_rematerialisation_changes_neither_output_nor_gradient():
    pixels, state, params = inputs_of(SPARSE), state_of(SPARSE), sparse_variables()["params"]

    def loss(params: Any, remat: bool) -> Any:
        encoded: Any = SPARSE.build("float32", remat=remat).apply({"params": params}, pixels, None, state)
        return jnp.sum(encoded.tokens**2) + sum(jnp.sum(v) for v in encoded.routed.losses.values())

    run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain, other = run(params, False), run(params, True)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), plain, other)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(plain[1]["moe_blocks"]["moe"]))


def test_pictures_are_not_routed_by_token_ids():
    by_id = dataclasses.replace(MOE, scheme="hash")
    with pytest.raises(ValueError, match="moe.scheme='hash' routes by token ids, which pictures do not have"):
        dataclasses.replace(SPARSE, moe=by_id)
    assert dataclasses.replace(KINDS["text_sparse"], moe=by_id).stack  # texts have them


@pytest.mark.parametrize("config", [VIT, TEXTS], ids=["vit", "text"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_layers": (1,)}, r"sparse_layers=\(1,\) needs moe"),
        ({"moe": MOE}, r"moe needs sparse_layers, numbers from 0 to \d"),
        ({"moe": MOE, "sparse_layers": (9,)}, r"sparse_layers=\(9,\) must be ascending numbers from 0 to \d"),
        ({"moe": MOE, "sparse_layers": (1, 0)}, r"sparse_layers=\(1, 0\) must be ascending"),
    ],
)
def test_sparse_layers_that_do_not_exist_are_refused(config: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **options)


# In the model.


def model_with(encoder: Any, **options: Any) -> VisionLanguageConfig:
    return dataclasses.replace(tiny.config(), encoder=encoder, **options)


def test_a_tile_is_used_if_a_visual_token_comes_from_it():
    index = jnp.array([[0, 3, 12, 13], [-1, -1, -1, -1], [8, 12, -1, 11]])  # 3 tiles of 4, two vectors
    found = used_tiles(index, tiles=3, tile_tokens=4)
    expected = [[True, False, False], [False] * 3, [False, False, True]]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sam", "resnet"])
def test_any_encoder_of_images_stands_before_the_language_model(kind: str):
    encoder: Any = KINDS[kind]
    config = model_with(
        encoder,
        adapter=dataclasses.replace(tiny.config().adapter, downsample=1),
        language=dataclasses.replace(tiny.config().language, num_layers=1),
    )
    assert config.tile_tokens == encoder.num_tokens and not config.stacks
    state, batch = stacks.init_state(config.stacks), config.smallest_batch(2)
    random = np.random.default_rng(0)
    batch = batch.replace(  # type: ignore[attr-defined]
        tiles=random.integers(0, 256, batch.tiles.shape).astype(np.uint8),
        visual_index=np.array([[0, 1]] * 2, np.int32),
        visual_slot=np.array([[0, -1]] * 2, np.int32),
    )
    batch, model = jax.tree.map(jnp.asarray, batch), config.build()
    init = functools.partial(model.init, method="initialize")
    shapes = nn.meta.unbox(jax.eval_shape(lambda: init(jax.random.key(0), batch, state)))
    variables: Any = jax.tree.map(
        lambda a: 0.1 + 0.1 * jnp.abs(random.normal(size=a.shape).astype("f")), shapes
    )
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    @jax.jit
    def run(params: Any) -> Any:
        logits: Any = model.apply({"params": params, **rest}, batch, state, method="initialize")
        return jnp.sum(jax.nn.log_softmax(logits)[..., 3])

    value, gradient = jax.value_and_grad(run)(variables["params"])
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(jax.tree.leaves(gradient["encoder"]["stem"])[0])


@pytest.mark.slow
def test_the_model_reports_the_sparse_layers_of_its_encoder_and_hands_them_their_state():
    config = model_with(dataclasses.replace(SPARSE, num_layers=2, sparse_layers=(1,)))
    stack = config.stacks[ENCODER]
    assert list(config.stacks) == [LANGUAGE, ENCODER] and stack.runs == ((ENCODER, "moe_blocks", "moe"),)
    params, state = tiny.build(config)
    rows = [[tiny.example(0, tiles=2, text=3)], [tiny.example(1, text=4)]]
    batch = jax.tree.map(jnp.asarray, tiny.batch(rows))
    model: Any = config.build()
    output, seen = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
        {"params": params}, batch, state
    )
    used = int(used_tiles(batch.visual_index, tiles=2, tile_tokens=4).sum())
    assert used == 3
    np.testing.assert_array_equal(output.routed[ENCODER].stats.tokens, [[0, used * 16]])
    (layer,) = stacks.sown(seen["intermediates"], stack)
    assert layer.logits.shape == (batch.tiles.shape[0] * 2, 16, 4)
    new = stacks.update_state(state, {n: o.stats for n, o in output.routed.items()}, config.stacks)
    assert np.any(new[ENCODER]["bias"] != state[ENCODER]["bias"])
    vision = jnp.zeros((*batch.visual_index.shape, 16))
    again = jax.eval_shape(lambda: model.apply({"params": params}, batch, state, seen=vision))
    assert list(again.routed) == [LANGUAGE]


def test_a_text_encoder_and_tiles_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"encoder=TextEncoderConfig takes inputs of shape \(6,\)"):
        model_with(TEXTS)
    experiment = config_lib.load(EXPERIMENT)
    with pytest.raises(ValueError, match="differs from the images of model.encoder, 16 x 16"):
        model_with(RESNET).check_data(experiment.data)


OWN = """
import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vl_jax.encoders.transformer import Encoded


@dataclasses.dataclass(frozen=True)
class Average:
    output_dim: int = 6
    side: int = 32

    num_tokens = 4
    grid = 2
    stack = None

    @property
    def input_shape(self):
        return (self.side, self.side, 3)

    def build(self, dtype, *, remat=False):
        return Model(self, dtype)


class Model(nn.Module):
    config: Average
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels, valid=None, routing_state=None):
        cells = pixels.astype(self.dtype).reshape(-1, 2, 16, 2, 16, 3).mean((2, 4))
        tokens = nn.Dense(self.config.output_dim)(cells.reshape(-1, 4, 3))
        return Encoded(tokens, tokens.mean(1))


@dataclasses.dataclass(frozen=True)
class Lacking:
    grid: int = 2
"""


def test_an_encoder_in_a_file_of_ones_own_stands_in_an_experiment(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    choice = [("model.encoder", f"{file}:Average"), ("model.encoder.output_dim", "5")]
    experiment = config_lib.load(EXPERIMENT, [*choice, ("model.adapter.downsample", "1")])
    encoder = experiment.model.encoder
    assert isinstance(encoder, EncoderConfig) and encoder.output_dim == 5
    assert experiment.model.tile_tokens == 4
    again = schema.from_json(schema.to_json(experiment), type(experiment))
    assert again == experiment
    model, state = experiment.model.build(), stacks.init_state(experiment.model.stacks)
    batch = jax.tree.map(jnp.asarray, experiment.model.smallest_batch(1))
    init = functools.partial(model.init, method="initialize")
    shapes: Any = jax.eval_shape(lambda: init(jax.random.key(0), batch, state))
    assert shapes["params"]["encoder"]["Dense_0"]["kernel"].shape == (3, 5)
    with pytest.raises(ConfigError, match="Lacking is no encoder: it has no output_dim"):
        config_lib.load(EXPERIMENT, [("model.encoder", f"{file}:Lacking")])


def test_encoders_are_exchanged_by_name_and_old_files_still_load():
    experiment = config_lib.load(EXPERIMENT)
    tree = json.loads(schema.to_json(experiment))
    old = tree["model"]["encoder"]
    assert old["_type"] == "ViTConfig"
    del old["moe"], old["sparse_layers"]
    assert schema.from_json(json.dumps(tree), type(experiment)) == experiment
    none = config_lib.replace(experiment, [("model.encoder", "None")])
    assert none.model.encoder is None
    with pytest.raises(ConfigError, match="config.model.encoder is None; first set it to one of ViTConfig"):
        config_lib.replace(none, [("model.encoder.image_size", "32")])
    changed = [("model.encoder", "ResNetConfig"), ("model.encoder.image_size", "32")]
    found = config_lib.replace(none, changed).model.encoder
    assert found == ResNetConfig(image_size=32)
