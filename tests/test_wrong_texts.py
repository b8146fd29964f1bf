"""Wrong texts in contrastive training: further columns, over devices and in micro-batches."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import sharding
from vl_jax.batch import Batch, Given, blank
from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.data.text.negatives import NegativeTexts
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.heads.pairs import FOREIGN, Pairs, PairVectors
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.objectives.contrastive_losses import softmax_sums
from vl_jax.train.objectives.wrong_texts import as_rows
from vl_jax.train.step import TrainState

ROWS, WIDTH, T, N, WORDS = 32, 6, 5, 2, 40
IDS = np.arange(ROWS, dtype=np.int32) // 2 * 2  # every picture twice, in different micro-batches


class Towers(nn.Module):
    """A picture is a vector, a text the mean of its tokens; a layer behind each."""

    @nn.compact
    def __call__(self, batch: Batch, routing: Any) -> Any:
        table = self.param("table", nn.initializers.normal(1.0), (WORDS, WIDTH))
        there = (batch.segment_ids > 0)[..., None].astype(jnp.float32)
        words = jnp.sum(table[batch.tokens] * there, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1.0)
        sides = {"image": batch.media["x"].values, "text": words}
        image, text = (jnp.tanh(nn.Dense(WIDTH, name=name)(x)) + 0.1 for name, x in sides.items())
        image, text = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in (image, text))
        scale = self.param("scale", nn.initializers.constant(1.0), ())
        bias = self.param("bias", nn.initializers.constant(-2.0), ())
        return types.SimpleNamespace(predictions={"pairs": PairVectors(image, text, scale, bias)}, routed={})


def rows() -> Batch:
    """Some rows have fewer wrong texts than there is room for, some none, and one has no picture."""
    rng = np.random.default_rng(0)
    sizes = {**dict.fromkeys(("Q", "S", "M", "h", "w", "c"), 1), "T": T}
    present = np.arange(ROWS) != 5
    lengths = rng.integers(1, T + 1, (ROWS, N, 1)) * (rng.random((ROWS, N, 1)) < 0.7)
    negatives = np.concatenate([lengths, rng.integers(0, WORDS, (ROWS, N, T))], axis=2).astype(np.int32)
    batch = dataclasses.replace(
        blank(sizes, ROWS),
        tokens=rng.integers(0, WORDS, (ROWS, T)).astype(np.int32),
        segment_ids=(np.arange(T) < rng.integers(1, T + 1, (ROWS, 1))).astype(np.int32),
        media={
            "x": Given(rng.normal(size=(ROWS, WIDTH)).astype(np.float32), present),
            "negatives": Given(negatives, lengths.any(axis=(1, 2))),
        },
        labels={"pairs": Given(IDS, present)},
    )
    return jax.tree.map(jnp.asarray, batch)


def state_of(model: nn.Module, batch: Batch) -> TrainState:
    made = nn.meta.unbox(jax.jit(lambda batch: model.init(jax.random.key(0), batch, {}))(batch))["params"]
    return TrainState(jnp.zeros((), jnp.int32), made, None, {})


def value(objective: ContrastivePairs, mesh: Any = None) -> Any:
    """The loss and its gradient."""
    model, batch = Towers(), rows()
    state = state_of(model, batch)

    def compute(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> Any:
            return objective(params, state, batch, model=model, rngs=None).losses["pairs/loss"] / ROWS

        return jax.value_and_grad(loss)(params)

    if mesh is None:
        return jax.jit(compute)(state.params, batch)
    with sharding.use_mesh(mesh):
        spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        return jax.jit(compute)(state.params, jax.device_put(batch, spread))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1.0)


@pytest.mark.slow
def test_the_loss_is_that_of_all_texts_as_columns():
    """Worked out row by row: the model sees every text alone, and ids say which belong where."""
    model, batch = Towers(), rows()
    state = state_of(model, batch)
    objective = ContrastivePairs(negatives=True, chunk=8)
    found = jax.jit(lambda batch: objective(state.params, state, batch, model=model, rngs=None))(batch)

    @jax.jit
    def read(batch: Batch) -> Any:
        return model.apply({"params": state.params}, batch, {}).predictions["pairs"]

    pairs = read(batch)
    texts, ids, right = [], [], 0
    negatives, present = (
        np.asarray(x) for x in (batch.media["negatives"].values, batch.labels["pairs"].present)
    )
    for row in range(ROWS):
        texts.append(pairs.text[row])
        ids.append(IDS[row] if present[row] else -1)
        for length, *tokens in negatives[row]:
            if not length or not present[row]:
                continue
            alone = batch.replace(
                tokens=jnp.asarray(tokens, jnp.int32)[None],
                segment_ids=jnp.asarray(np.arange(T) < length, jnp.int32)[None],
                media={"x": Given(jnp.zeros((1, WIDTH)), jnp.zeros(1, bool))},
            )
            texts.append(read(alone).text[0])
            ids.append(FOREIGN)
            right += float(pairs.image[row] @ texts[-1]) < float(pairs.image[row] @ pairs.text[row])
    expected = softmax_sums(
        pairs.image,
        jnp.stack(texts),
        pairs.scale,
        image_ids=jnp.where(batch.labels["pairs"].present, IDS, -1),
        text_ids=jnp.asarray(ids, jnp.int32),
        chunk=100,
    )
    np.testing.assert_allclose(found.losses["pairs/loss"], expected.loss, rtol=1e-6)
    totals = objective.total(batch)
    assert (totals["pairs"], totals["pairs/wrong"]) == (ROWS - 1, ids.count(FOREIGN))
    assert found.metrics["pairs/wrong/told_apart"] == right
    has = (negatives[..., 0] > 0).any(axis=1) & present
    assert found.metrics["pairs/with_wrong_text"] == float(has.sum())


@pytest.mark.parametrize("form, hardness", [("softmax", 0.0), ("sigmoid", 1.0)])
@pytest.mark.slow
def test_eight_devices_and_micro_batches_have_the_gradient_of_the_whole_batch(form: Any, hardness: float):
    objective = ContrastivePairs(loss=form, hardness=hardness, negatives=True, chunk=8)
    expected = value(objective)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    assert_close(value(objective, mesh), expected, 1e-6)
    assert_close(value(dataclasses.replace(objective, micro_batches=2)), expected, 1e-5)
    assert_close(value(dataclasses.replace(objective, micro_batches=4), mesh), expected, 1e-5)
    # They do count.
    plain = value(dataclasses.replace(objective, negatives=False))
    assert float(expected[0]) > float(plain[0])


@pytest.mark.slow
def test_rows_without_a_wrong_text_count_as_if_there_were_no_room_for_any():
    batch = rows()
    none = Given(jnp.zeros((ROWS, N, 1 + T), jnp.int32), jnp.zeros(ROWS, bool))
    batch = batch.replace(media={**batch.media, "negatives": none})
    model = Towers()
    state = state_of(model, batch)

    def loss(negatives: bool) -> Any:
        objective = ContrastivePairs(negatives=negatives)
        found = jax.jit(lambda batch: objective(state.params, state, batch, model=model, rngs=None))(batch)
        return found.losses["pairs/loss"]

    np.testing.assert_allclose(loss(True), loss(False), rtol=1e-6)


@pytest.mark.slow
def test_a_joint_model_reads_them_without_its_tower_of_pictures():
    text = TextEncoderConfig(
        vocab_size=WORDS, max_length=T, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=2, causal=False,
        projection_dim=0,
    )  # fmt: skip
    image = ViTConfig(image_size=8, patch_size=4, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=2)
    config = JointConfig((Tower("image", image), Tower("text", text, "tokens")), (Pairs(dim=4),))
    batch, model = rows(), config.build()
    batch = batch.replace(
        tiles=jnp.zeros((ROWS, 1, 8, 8, 3), jnp.uint8),
        visual_index=jnp.zeros((ROWS, 4), jnp.int32),
        media={"negatives": batch.media["negatives"]},
    )
    state = state_of(model, batch)
    vectors: Any = jax.eval_shape(
        lambda params: model.apply({"params": params}, as_rows(batch), {}), state.params
    )
    assert vectors.predictions["pairs"].text.shape == (ROWS * N, 4)
    assert vectors.streams["image"].tokens.shape[1] == 0

    def loss(params: Any) -> Any:
        found = ContrastivePairs(negatives=True)(params, state, batch, model=model, rngs=None)
        return found.losses["pairs/loss"]

    # A text without a token has no part in the gradient, not even one that is no number.
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(state.params)))


def test_a_batch_without_wrong_texts_is_refused():
    batch = rows()
    objective = ContrastivePairs(negatives=True)
    with pytest.raises(ValueError, match=r"negatives=True .* set data\.conversation\.negatives"):
        objective.total(batch.replace(media={"x": batch.media["x"]}))
    with pytest.raises(ValueError, match="hardness=-1: must be >= 0"):
        ContrastivePairs(hardness=-1)


# As tokens.


def sample(text: str, *negatives: str) -> Sample:
    return Sample("a", (Turn("", text, TEXT),), negatives=negatives)


def test_wrong_texts_are_written_as_texts_are():
    tokenizer = load_tokenizer("", reads="text")
    field = NegativeTexts(tokenizer, count=3, max_tokens=12)
    found = field.read(sample("a red cat", "a blue cat", "a red dog"))
    assert found is not None and found.shape == field.shape and found.dtype == np.int32
    for row, text in zip(found, ["a blue cat", "a red dog"], strict=False):
        ids = [*tokenizer.encode(text), *tokenizer.around[1]]
        assert row[0] == len(ids) and row[1 : 1 + len(ids)].tolist() == ids
        assert (row[1 + len(ids) :] == tokenizer.pad).all()
    assert found[2, 0] == 0
    assert field.read(sample("a red cat")) is None


def test_one_that_the_cut_makes_true_is_none():
    tokenizer = load_tokenizer("", reads="text")
    ids = tokenizer.encode("a cat on a red")
    field = NegativeTexts(tokenizer, count=2, max_tokens=3 + len(tokenizer.around[1]))
    assert len(ids) > 3
    found = field.read(sample("a cat on a red", "a cat on a blue", "one cat on a red"))
    assert found is not None and found[:, 0].tolist() == [0, field.max_tokens]
    assert field.read(sample("a cat on a red", "a cat on a blue")) is None
