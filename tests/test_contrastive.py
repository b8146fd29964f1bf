"""Image-text pairs: the text encoder, joint models of a pair, and published pairs in and out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity_vision import pair_batch, similarity

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch, Given
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.encoders.text import TextEncoder, TextEncoderConfig, pooled_positions
from vl_jax.encoders.vit import ViT, ViTConfig
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.heads.pairs import Pairs, PairVectors
from vl_jax.interop import rules, vision
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import plan_layout, put_batch
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.step import TrainState

pytestmark = pytest.mark.slow  # a pair beside the main path: minutes of compilation

# The same sums in another order, over values of order 1.
assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)

TEXT = TextEncoderConfig(
    vocab_size=32,
    max_length=8,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=2,
    end_id=9,
    projection_dim=6,
)
BOTH_WAYS = dataclasses.replace(TEXT, causal=False, pooling="last", projection_bias=True)
IMAGE = ViTConfig(
    image_size=8,
    patch_size=4,
    embed_dim=16,
    mlp_dim=24,
    num_layers=1,
    num_heads=2,
    class_token=True,
    pooling="class",
    projection_dim=6,
)
SOFTMAX = JointConfig((Tower("image", IMAGE), Tower("text", TEXT, "tokens")), (Pairs(dim=None),))
SIGMOID = JointConfig(
    (Tower("image", IMAGE), Tower("text", BOTH_WAYS, "tokens")),
    (Pairs(dim=None, initial_scale=math.log(10), bias=True),),
)
TOKENS = jnp.asarray([[3, 9, 5, 9, 7, 30], [30, 1, 30, 2, 4, 4], [6, 6, 6, 6, 6, 9]])


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@functools.cache
def make(config: TextEncoderConfig) -> Any:
    boxed = jax.eval_shape(lambda: TextEncoder(config).init(jax.random.key(0), TOKENS)["params"])
    flat = params_lib.flatten(nn.meta.unbox(boxed))
    return params_lib.unflatten(
        {
            path: 0.3 * random(*leaf.shape, seed=i) + np.float32(path.endswith("scale"))
            for i, (path, leaf) in enumerate(flat.items())
        }
    )


def encode(config: TextEncoderConfig, tokens: Any = TOKENS, valid: Any = None) -> Any:
    return jax.jit(TextEncoder(config).apply)({"params": make(config)}, tokens, valid)


# Text.


@pytest.mark.parametrize(
    "pooling, expected", [("first_end", [1, 0, 5]), ("largest_id", [5, 0, 5]), ("last", [5, 5, 5])]
)
def test_where_a_text_is_pooled(pooling: Any, expected: list[int]):
    config = dataclasses.replace(TEXT, pooling=pooling, projection_dim=0)
    assert pooled_positions(TOKENS, config).tolist() == expected
    encoded = encode(config)
    assert_close(encoded.pooled, encoded.tokens[np.arange(3), expected])


def test_no_token_of_a_causal_text_sees_a_later_one():
    own = make(TEXT)

    def outputs(offset: jax.Array) -> jax.Array:
        # Every position takes a row of the table of its own, so that its gradient can be told apart.
        table = jnp.concatenate([own["embedding"], own["embedding"][TOKENS[0]] + offset])
        config = dataclasses.replace(TEXT, vocab_size=len(table))
        params = {**own, "embedding": table}
        return TextEncoder(config).apply({"params": params}, 32 + jnp.arange(6)[None]).tokens[0]  # type: ignore[union-attr]

    jacobian = jax.jit(jax.jacobian(outputs))(jnp.zeros((6, 16)))
    reach = np.abs(jacobian).sum(axis=(1, 3)) > 0
    assert (reach == np.tril(np.ones((6, 6), bool))).all()


def test_what_follows_the_end_of_a_causal_text_does_not_matter():
    changed = TOKENS.at[0, 2:].set(4)
    assert_close(encode(TEXT, changed).pooled[0], encode(TEXT).pooled[0])
    # Where all positions see each other it does.
    assert np.abs(encode(BOTH_WAYS, changed).pooled[0] - encode(BOTH_WAYS).pooled[0]).max() > 1e-3


@pytest.mark.parametrize("config", [TEXT, BOTH_WAYS], ids=["causal", "both ways"])
def test_tokens_that_are_not_valid_are_not_seen(config: TextEncoderConfig):
    valid = jnp.ones(TOKENS.shape, bool).at[:, 3].set(False)
    before, after = encode(config, valid=valid), encode(config, TOKENS.at[:, 3].set(8), valid)
    others = np.array([0, 1, 2, 4, 5])
    assert_close(before.tokens[:, others], after.tokens[:, others])
    assert np.abs(before.tokens[:, 4] - encode(config).tokens[:, 4]).max() > 1e-3


def test_all_valid_is_the_same_as_no_mask():
    for config in (TEXT, BOTH_WAYS):
        assert_close(encode(config, valid=jnp.ones(TOKENS.shape, bool)).pooled, encode(config).pooled)


def test_a_text_longer_than_the_position_table_is_refused():
    with pytest.raises(ValueError, match="text of 9 tokens; the encoder has max_length=8 positions"):
        encode(TEXT, jnp.ones((1, 9), jnp.int32))


# Pairs.

CONFIGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}


@functools.cache
def start(loss: str) -> Any:
    init = jax.jit(lambda key: CONFIGS[loss].build().init(key, pairs(8), {})["params"])
    return nn.meta.unbox(init(jax.random.key(0)))


def pairs(count: int) -> Batch:
    tokens = np.random.default_rng(1).integers(10, 32, (count, 6))
    tokens[:, -1] = 9
    pixels = np.random.default_rng(0).normal(size=(count, 8, 8, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    arrays = {"in_input_ids": tokens, "in_pixel_values": pixels}
    ids = np.arange(count, dtype=np.int32)
    return pair_batch(SOFTMAX, arrays).replace(labels={"pairs": Given(ids, np.ones(count, bool))})


def vectors(params: Any, loss: str, batch: Batch) -> PairVectors:
    return CONFIGS[loss].build().apply({"params": params}, batch, {}).predictions["pairs"]  # type: ignore[union-attr]


def loss_of(params: Any, loss: str, batch: Batch) -> jax.Array:
    state = TrainState(jnp.zeros((), jnp.int32), params, None, {})
    objective = ContrastivePairs(loss=loss, chunk=3)  # type: ignore[arg-type]
    sums = objective(params, state, batch, model=CONFIGS[loss].build(), rngs=None)
    return sums.losses["pairs/loss"] / objective.total(batch)["pairs"]


def test_a_head_without_projection_has_a_scale_and_for_the_sigmoid_loss_a_bias():
    assert set(start("softmax")) == set(start("sigmoid")) == {"image", "text", "pairs"}
    assert set(start("softmax")["pairs"]) == {"scale"}
    assert float(start("softmax")["pairs"]["scale"]) == pytest.approx(math.log(1 / 0.07))
    assert float(start("sigmoid")["pairs"]["scale"]) == pytest.approx(math.log(10))
    assert float(start("sigmoid")["pairs"]["bias"]) == -10


def test_without_projection_the_vectors_are_those_of_the_towers_at_length_1():
    batch = jax.tree.map(jnp.asarray, pairs(8))
    output: Any = SOFTMAX.build().apply({"params": start("softmax")}, batch, {})
    text = TextEncoder(TEXT).apply({"params": start("softmax")["text"]}, batch.tokens)
    image = ViT(IMAGE).apply({"params": start("softmax")["image"]}, batch.tiles[:, 0])
    found = output.predictions["pairs"]
    for vector, encoded in ((found.image, image), (found.text, text)):
        norms = np.linalg.norm(encoded.pooled, axis=1, keepdims=True)  # type: ignore[union-attr]
        assert_close(vector, encoded.pooled / norms)  # type: ignore[union-attr]


def test_padding_is_read_like_any_token_by_an_encoder_that_sees_it():
    seeing = dataclasses.replace(BOTH_WAYS, sees_padding=True)
    valid = jnp.arange(6) < jnp.array([[3], [4], [6]])
    assert_close(encode(seeing, valid=valid).pooled, encode(BOTH_WAYS).pooled)
    assert np.abs(encode(BOTH_WAYS, valid=valid).pooled - encode(BOTH_WAYS).pooled)[:2].max() > 1e-3


def test_rows_of_another_length_are_refused_where_padding_is_seen():
    text = dataclasses.replace(BOTH_WAYS, sees_padding=True)
    config = dataclasses.replace(SIGMOID, towers=(Tower("image", IMAGE), Tower("text", text, "tokens")))
    data = DataConfig(max_tokens=8, tiling=TilingConfig(8, views="global"))
    config.check_data(data)
    with pytest.raises(ValueError, match="data.max_tokens=7 differs from the 8 of model.towers.text.encoder"):
        config.check_data(dataclasses.replace(data, max_tokens=7))


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONFIGS)
def test_loss_and_gradients_are_those_of_one_device_when_the_batch_is_spread(loss: str):
    def value(params: Any, batch: Batch) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: loss_of(p, loss, batch)))(params)

    expected = value(start(loss), pairs(8))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    layout = plan_layout(CONFIGS[loss], CONFIGS[loss].smallest_batch(4), mesh)
    params = jax.device_put(start(loss), jax.tree.map(lambda leaf: leaf.sharding, layout.params))
    with sharding.use_mesh(layout.mesh, layout.rules):
        found = value(params, put_batch(pairs(8), layout))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONFIGS)
def test_training_brings_every_image_to_its_text(loss: str):
    optimizer, batch = optax.adam(3e-3), pairs(8)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss_of)(params, loss, batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = start(loss)
    with jax.numpy_dtype_promotion("standard"):  # inside optax
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=80))
        (params, _), values = run((params, optimizer.init(params)))
    assert values[-1] < 0.1 * values[0]
    assert (np.argmax(similarity(vectors(params, loss, batch)), axis=1) == np.arange(8)).all()


@pytest.mark.parametrize(
    "changes, features",
    [({"projection_dim": 5}, 5), ({"pooling": "none", "projection_dim": 0}, 16)],
    ids=["projection", "mean of the tokens"],
)
def test_encoders_that_do_not_match_are_refused(changes: dict[str, Any], features: int):
    towers = (Tower("image", dataclasses.replace(IMAGE, **changes)), Tower("text", TEXT, "tokens"))
    with pytest.raises(ValueError, match=f"of 'image' have {features} features, of 'text' 6; must be equal"):
        dataclasses.replace(SOFTMAX, towers=towers)
    # Behind a fusion it is seen when the model is made.
    heads = (Pairs(image="fused", dim=None),)
    config = JointConfig(towers, heads, GatedStreams(reader="image", source="text"))
    with pytest.raises(ValueError, match="of 'fused' have 16 features, of 'text' 6"):
        jax.eval_shape(lambda: config.build().init(jax.random.key(0), pairs(2), {}))


@pytest.mark.parametrize("options", [{"vocab_size": 0}, {"max_length": 0}, {"num_heads": 3}])
def test_text_options_that_make_no_sense_are_refused(options: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(options))):
        dataclasses.replace(TEXT, **options)


# Published weights.

_SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
_TEXT = {**_SIZES, "hidden_size": 9, "vocab_size": 30, "max_position_embeddings": 7}
PUBLISHED: dict[str, dict[str, Any]] = {
    "siglip": {
        "text_config": {**_TEXT, "projection_size": 12},
        "vision_config": {**_SIZES, "image_size": 9, "patch_size": 4},
    },
    "clip": {
        "text_config": _TEXT,
        "vision_config": {**_SIZES, "image_size": 9, "patch_size": 4},
        "projection_dim": 5,
    },
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_weights_come_back_as_they_were(kind: str):
    config = vision.read_contrastive({"model_type": kind, **PUBLISHED[kind]})
    boxed = jax.eval_shape(lambda: config.build().init(jax.random.key(0), config.smallest_batch(2), {}))
    targets = nn.meta.unbox(boxed)["params"]
    flat = {path: leaf.shape for path, leaf in params_lib.flatten(targets).items()}
    plan = rules.plan(vision.contrastive_rules(kind), flat)
    keys = [(key, leaf.source_shape) for leaf in plan.leaves for _, key in leaf.sources()]
    weights = {key: np.asarray(random(*shape, seed=i)) for i, (key, shape) in enumerate(keys)}
    assert weights["logit_scale"].shape == ((1,) if kind == "siglip" else ())
    old = {"text_model.embeddings.position_ids": np.arange(7)[None]}
    tree = rules.read(plan, weights | old, targets, ignored=vision.IGNORED)
    back = dict(rules.export(plan, tree))
    assert back.keys() == weights.keys()
    for key, array in back.items():
        np.testing.assert_array_equal(array, weights[key])


def test_what_a_pair_leaves_out_is_the_default_of_its_classes():
    clip = vision.read_contrastive({"model_type": "clip"})
    image, text = (tower.encoder for tower in clip.towers)
    assert text == TextEncoderConfig()
    assert (image.input_shape, image.grid, image.pooled_dim) == ((224, 224, 3), 7, 512)  # pyright: ignore
    assert clip.heads == (Pairs(dim=None, initial_scale=2.6592),)
    siglip = vision.read_contrastive({"model_type": "siglip", "text_config": None})
    image, text = (tower.encoder for tower in siglip.towers)
    assert text.max_length == 64 and text.pooled_dim == image.pooled_dim == 768  # pyright: ignore
    assert siglip.heads == (Pairs(dim=None, initial_scale=math.log(10), bias=True),)


def test_an_image_without_a_vector_is_refused():
    config = {"model_type": "siglip", "vision_config": {"vision_use_head": False}}
    with pytest.raises(ValueError, match="vision_use_head=False"):
        vision.read_contrastive(config)


def text_of(config: dict[str, Any]) -> TextEncoderConfig:
    encoder = vision.read_contrastive({"model_type": "clip", **config}).towers[1].encoder
    assert isinstance(encoder, TextEncoderConfig)
    return encoder


@pytest.mark.parametrize("end, pooling", [(2, "largest_id"), (9, "first_end")])
def test_an_end_of_text_of_2_means_the_largest_id(end: int, pooling: str):
    text = text_of({"text_config": {"eos_token_id": end}})
    assert text.pooling == pooling and text.end_id == end


def test_the_old_form_of_a_part_wins_as_a_whole():
    config = {
        "text_config": {"eos_token_id": 2, "hidden_size": 32},
        "text_config_dict": {"hidden_size": 64},
    }
    text = text_of(config)
    assert (text.embed_dim, text.pooling, text.end_id) == (64, "first_end", 49_407)


def test_a_pair_of_another_type_is_refused():
    with pytest.raises(ValueError, match="model_type='blip': known are siglip, clip"):
        vision.read_contrastive({"model_type": "blip"})
