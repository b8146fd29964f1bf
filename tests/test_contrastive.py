"""Image-text pairs: the text encoder, both losses, and published pairs in and out."""

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
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import losses, sharding
from vl_jax import params as params_lib
from vl_jax.encoders.contrastive import Contrastive, ContrastiveConfig, pair_loss, similarity, unit
from vl_jax.encoders.text import TextEncoder, TextEncoderConfig, pooled_positions
from vl_jax.encoders.vit import ViTConfig
from vl_jax.interop import rules, vision

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
SOFTMAX = ContrastiveConfig(IMAGE, TEXT)
SIGMOID = ContrastiveConfig(IMAGE, BOTH_WAYS, loss="sigmoid", initial_scale=math.log(10))
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


# Losses.


def test_losses_by_hand():
    logits = jnp.asarray([[2.0, 0.0], [1.0, 3.0]])

    def log_softmax(first: float, second: float) -> float:
        return -math.log(1 + math.exp(second - first))

    softmax = -(log_softmax(2, 0) + log_softmax(3, 1) + log_softmax(2, 1) + log_softmax(3, 0)) / 4
    sigmoid = sum(math.log(1 + math.exp(-x)) for x in (2, -0.0, -1, 3)) / 2
    assert_close(losses.softmax_contrastive(logits), softmax)
    assert_close(losses.sigmoid_contrastive(logits), sigmoid)


@pytest.mark.parametrize("loss", [losses.softmax_contrastive, losses.sigmoid_contrastive])
def test_losses_do_not_depend_on_the_order_of_pairs_and_fall_with_their_logits(loss: Any):
    logits, order = 3 * random(5, 5), np.array([3, 0, 4, 1, 2])
    assert_close(loss(logits[order][:, order]), loss(logits))
    gradient = jax.grad(loss)(logits)
    same = np.eye(5, dtype=bool)
    assert (gradient[same] < 0).all() and (gradient[~same] > 0).all()


@pytest.mark.parametrize("loss", [losses.softmax_contrastive, losses.sigmoid_contrastive])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_stay_finite_for_large_logits(loss: Any, size: float):
    value, gradient = jax.value_and_grad(loss)(size * jnp.eye(3))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_similarity_is_of_unit_vectors_scaled_and_shifted():
    images, texts = unit(5 * random(3, 4)), unit(random(2, 4, seed=1))
    assert_close(np.linalg.norm(images, axis=1), np.ones(3))
    scale, bias = jnp.float32(1.5), jnp.float32(-2.0)
    cosines = np.asarray(images) @ np.asarray(texts).T
    assert_close(similarity(images, texts, scale, None), math.exp(1.5) * cosines)
    assert_close(similarity(images, texts, scale, bias), math.exp(1.5) * cosines - 2)


# Pairs.

CONFIGS = {"softmax": SOFTMAX, "sigmoid": SIGMOID}


@functools.cache
def start(loss: str) -> Any:
    config = CONFIGS[loss]
    init = jax.jit(lambda key: Contrastive(config).init(key, *pairs(8))["params"])
    return nn.meta.unbox(init(jax.random.key(0)))


def pairs(count: int) -> tuple[jax.Array, jax.Array]:
    tokens = np.random.default_rng(1).integers(10, 32, (count, 6))
    tokens[:, -1] = 9
    return random(count, 8, 8, 3), jnp.asarray(tokens, jnp.int32)


def loss_of(params: Any, loss: str, *inputs: Any) -> jax.Array:
    return pair_loss(Contrastive(CONFIGS[loss]).apply({"params": params}, *inputs), CONFIGS[loss])  # type: ignore[arg-type]


def test_the_bias_belongs_to_the_sigmoid_loss():
    assert "logit_bias" not in start("softmax")
    assert float(start("softmax")["logit_scale"]) == pytest.approx(math.log(1 / 0.07))
    assert float(start("sigmoid")["logit_scale"]) == pytest.approx(math.log(10))
    assert float(start("sigmoid")["logit_bias"]) == -10


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONFIGS)
def test_images_and_texts_may_differ_in_number(loss: str):
    images, tokens = pairs(8)
    model = Contrastive(CONFIGS[loss])
    full = model.apply({"params": start(loss)}, images, tokens)
    part = model.apply({"params": start(loss)}, images[:3], tokens[:5])
    assert_close(part.logits, full.logits[:3, :5])  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONFIGS)
def test_loss_and_gradients_are_those_of_one_device_when_the_batch_is_spread(loss: str):
    def value(params: Any, *inputs: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: loss_of(p, loss, *inputs)))(params)

    expected = value(start(loss), *pairs(8))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: Contrastive(CONFIGS[loss]).init(jax.random.key(0), *pairs(8))["params"])
    placed = sharding.shardings(sharding.place(boxed, mesh, sharding.AxisRules()), mesh)
    params = jax.device_put(start(loss), placed)
    inputs = [jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp", "expert")))) for x in pairs(8)]
    with sharding.use_mesh(mesh):
        found = value(params, *inputs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("loss", CONFIGS)
def test_training_brings_every_image_to_its_text(loss: str):
    optimizer, inputs = optax.adam(3e-3), pairs(8)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss_of)(params, loss, *inputs)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    params = start(loss)
    with jax.numpy_dtype_promotion("standard"):  # inside optax
        run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=80))
        (params, _), values = run((params, optimizer.init(params)))
    assert values[-1] < 0.1 * values[0]
    logits = Contrastive(CONFIGS[loss]).apply({"params": params}, *inputs).logits  # type: ignore[union-attr]
    assert (np.argmax(logits, axis=1) == np.arange(8)).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision": dataclasses.replace(IMAGE, projection_dim=5)}, "image vectors have 5 features, text vec"),
        (
            {"vision": dataclasses.replace(IMAGE, pooling="none", projection_dim=0)},
            "vision.pooling='none' gives no vector",
        ),
    ],
)
def test_encoders_that_do_not_match_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SOFTMAX, **changes)


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
    inputs = random(2, *config.vision.input_shape), jnp.ones((2, 3), jnp.int32)
    boxed = jax.eval_shape(lambda: Contrastive(config).init(jax.random.key(0), *inputs)["params"])
    targets = nn.meta.unbox(boxed)
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
    assert clip == dataclasses.replace(ContrastiveConfig(), initial_scale=2.6592)
    siglip = vision.read_contrastive({"model_type": "siglip", "text_config": None})
    assert siglip.text.max_length == 64 and siglip.text.pooled_dim == siglip.vision.pooled_dim == 768


@pytest.mark.parametrize("end, pooling", [(2, "largest_id"), (9, "first_end")])
def test_an_end_of_text_of_2_means_the_largest_id(end: int, pooling: str):
    text = vision.read_contrastive({"model_type": "clip", "text_config": {"eos_token_id": end}}).text
    assert text.pooling == pooling and text.end_id == end


def test_the_old_form_of_a_part_wins_as_a_whole():
    config = {
        "model_type": "clip",
        "text_config": {"eos_token_id": 2, "hidden_size": 32},
        "text_config_dict": {"hidden_size": 64},
    }
    text = vision.read_contrastive(config).text
    assert (text.embed_dim, text.pooling, text.end_id) == (64, "first_end", 49_407)


def test_a_pair_of_another_type_is_refused():
    with pytest.raises(ValueError, match="model_type='blip': known are siglip, clip"):
        vision.read_contrastive({"model_type": "blip"})
