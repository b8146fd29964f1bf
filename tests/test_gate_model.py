"""Gates with a budget in whole models: where they begin, and what is not run for rows that are closed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import TILES, TOKENS, Batch, without_pictures
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.fusion.budget import LEARNING, BudgetConfig, Grain, Openings
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.fusion.towers import before_answers
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.generate import generate
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import put_batch
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.sharding import MeshConfig

GRAINS: tuple[Grain, ...] = ("sample", "layer", "token")


def model_of(grain: Grain, **options: Any) -> VisionLanguageConfig:
    """Two dense layers, each behind a gate with a budget."""
    plain = tiny.config("top_k", fusion="gated")
    language = dataclasses.replace(plain.language, num_layers=2, num_dense_layers=2)
    gate = dataclasses.replace(plain.fusion.gate, budget=BudgetConfig(grain, **options))
    return dataclasses.replace(plain, language=language, fusion=dataclasses.replace(plain.fusion, gate=gate))


def questions(pictures: tuple[int, ...] = (1, 0, 1, 1)) -> Batch:
    """One question a row, with so many pictures."""
    rows = [[tiny.example(i, fusion="gated", text=5 + i, tiles=n)] for i, n in enumerate(pictures)]
    return tiny.batch(rows, fusion="gated", length=14)


@functools.partial(jax.jit, static_argnames=("model", "learning"))
def outputs(model: VisionLanguageConfig, params: Any, state: Any, batch: Batch, *, learning: bool) -> Any:
    """Logits, and what the gates decided."""
    network = VisionLanguage(model)
    rngs = {LEARNING: jax.random.key(0)} if learning else None
    output: Any = network.apply({"params": params}, batch, state, rngs=rngs)
    return network.apply({"params": params}, output.hidden, method="logits"), output.gates


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.slow
def test_a_gate_that_begins_closed_equals_the_model_without_pictures_to_the_bit(grain, hard):
    model = model_of(grain, hard=hard)
    params, state = tiny.build(model)
    assert sum(path.endswith("gate/opening") for path in params_lib.flatten(params))
    start = params_lib.map_paths(lambda path, x: 0 * x if path.endswith("gate/opening") else x, params)
    batch = questions()
    for learning in (False, True):
        (found, gates), (text, none) = (
            outputs(model, start, state, b, learning=learning) for b in (batch, without_pictures(batch))
        )
        assert none is None and float(gates.decided.open.sum()) > 0  # something does look, and adds nothing
        np.testing.assert_array_equal(found, text)
        assert np.abs(outputs(model, params, state, batch, learning=learning)[0] - text).max() > 1e-3


ROWS = 8


@functools.cache
def deciding(grain: Grain) -> tuple[Any, Any, Batch]:
    """Parameters and a batch of which rows 0, 3 and 6 have no picture, and three of the others look."""
    model = model_of(grain)
    params, state = tiny.build(model)
    batch = tiny.batch(
        [[tiny.example(i, fusion="gated", text=5 + i % 4, tiles=int(i % 3 > 0))] for i in range(ROWS)],
        fusion="gated",
        length=14,
    )
    given = jnp.asarray(batch.tokens), before_answers(batch)
    logits: Any = VisionLanguage(model).apply({"params": params}, *given, method=_looks)
    highest = np.sort(np.asarray(logits).max(axis=1)[np.asarray(batch.visual_segment_ids).any(axis=1)])
    middle = (highest[-3] + highest[-4]) / 2

    def centred(path: str, leaf: jax.Array) -> jax.Array:
        return leaf - middle if path.endswith("gate_looks/outer/bias") else leaf

    return params_lib.map_paths(centred, params), state, batch


def _looks(model: VisionLanguage, tokens: jax.Array, words: jax.Array) -> jax.Array:
    return model.language.looks(tokens, words)


def assert_same_but_for_rounding(found: Any, expected: Any) -> None:
    """To a millionth of the largest value: products of other numbers of rows are summed in another order."""
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


def looking_rows(gates: Any) -> int:
    """Rows that look in some layer."""
    return int((np.asarray(gates.decided.by_row) > 0).any(axis=0).sum())


@pytest.mark.parametrize("grain", ["sample", "layer"])
@pytest.mark.slow
def test_the_tower_runs_for_rows_that_look_alone_and_nothing_else_changes(grain):
    params, state, batch = deciding(grain)
    found, gates = outputs(model_of(grain), params, state, batch, learning=False)
    for whole in (model_of(grain, tower=False), model_of(grain, buckets=0)):
        expected, every = outputs(whole, params, state, batch, learning=False)
        assert_same_but_for_rounding(found, expected)
        assert float(every.tower) == ROWS
        np.testing.assert_array_equal(gates.decided.open, every.decided.open)
    # Three rows of eight look, and four are run: sizes are quarters.
    assert looking_rows(gates) == 3 and float(gates.decided.rows[0]) == 5 and float(gates.tower) == 4
    # A row that looks in no layer has nothing of its picture in what it says.
    looks = (np.asarray(gates.decided.by_row) > 0).any(axis=0)
    closed = np.flatnonzero(~looks & np.asarray(batch.visual_segment_ids).any(axis=1))
    tiles = np.array(batch.tiles)
    tiles[[closed[0], np.flatnonzero(looks)[0]]] ^= 255
    moved = outputs(model_of(grain), params, state, dataclasses.replace(batch, tiles=tiles), learning=False)[
        0
    ]
    moved = np.abs(moved - found).max(axis=(1, 2))
    assert moved[np.flatnonzero(looks)[0]] > 1e-4 and not np.delete(moved, np.flatnonzero(looks)[0]).any()


@pytest.mark.parametrize("grain", ["sample", "layer"])
@pytest.mark.slow
def test_eight_devices_leave_the_tower_out_each_for_its_rows_and_give_what_one_gives(grain):
    params, state, batch = deciding(grain)
    model = model_of(grain)
    found, gates = outputs(model, params, state, batch, learning=False)
    layout = tiny.layout_of(model, MeshConfig(data=2, fsdp=2, tensor=2), devices=8)
    targets = jax.tree.map(lambda leaf: leaf.sharding, layout.params)
    with sharding.use_mesh(layout.mesh, layout.rules):
        spread = jax.device_put(params, targets)
        given = jax.device_put(state, layout.replicated), put_batch(batch, layout)
        shared, counted = jax.jit(outputs.__wrapped__, static_argnames=("model", "learning"))(
            model, spread, *given, learning=False
        )
    assert_same_but_for_rounding(shared, found)
    # Four shards of two rows: one whose rows are closed runs nothing.
    looks = (np.asarray(gates.decided.by_row) > 0).any(axis=0)
    assert float(counted.tower) == looks.sum() < ROWS


@pytest.mark.slow
def test_the_tower_runs_once_for_an_answer_and_not_for_closed_rows():
    """Answers of a batch are those of a model that leaves no tower out."""
    params, state, batch = deciding("sample")
    prompts = tiny.batch(
        [[tiny.example(i, fusion="gated", text=5 + i % 4, tiles=int(i % 3 > 0))] for i in range(ROWS)],
        fusion="gated",
        length=14,
        left=True,
    )
    prompts = dataclasses.replace(prompts, loss_weights=np.zeros_like(prompts.loss_weights))
    config = GenerationConfig(max_new_tokens=3)
    written = [
        generate(params, state, prompts, model=VisionLanguage(m), config=config, stop=(-1,))
        for m in (model_of("sample"), model_of("sample", tower=False))
    ]
    np.testing.assert_array_equal(*written)


def test_a_tower_that_cannot_be_left_out_is_refused():
    assert not model_of("token").leaves_out_tower and model_of("layer").leaves_out_tower
    with pytest.raises(ValueError, match="tokens decide in the layers, after the tower has run"):
        BudgetConfig("token", tower=True)
    with pytest.raises(ValueError, match="buckets=0"):
        BudgetConfig("sample", buckets=0, tower=True)
    model = model_of("sample")
    experts = dataclasses.replace(model.encoder, moe=model.moe, sparse_layers=(1,))  # type: ignore[type-var]
    assert not dataclasses.replace(model, encoder=experts).leaves_out_tower
    with pytest.raises(ValueError, match="tower=True of a gate's budget: the encoder has experts"):
        dataclasses.replace(model_of("sample", tower=True), encoder=experts)


def looking_model(**options: Any) -> JointConfig:
    """A text tower that looks at pictures of another one through a gate with a budget."""
    picture = ViTConfig(image_size=16, patch_size=8, embed_dim=16, mlp_dim=32, num_layers=1, num_heads=2)
    words = TextEncoderConfig(
        vocab_size=64, max_length=8, embed_dim=16, mlp_dim=32, num_layers=1, num_heads=2, causal=False
    )
    gate = CrossModalGateConfig(2, 8, budget=BudgetConfig("sample", **options))
    fields: dict[str, Any] = {
        "towers": (Tower("image", picture), Tower("text", words, "tokens")),
        "fusion": GatedStreams(gate=gate),
        "heads": (Classification(("red", "green"), name="kind", field="kind", stream="fused"),),
    }
    return JointConfig(**fields)


@pytest.mark.slow
def test_a_joint_model_leaves_the_tower_out_that_closed_rows_would_look_at():
    model, random = looking_model(), np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.repeat(x, ROWS, axis=0), model.smallest_batch(1))
    seen = np.tile(np.arange(4, dtype=np.int32), (ROWS, 1))
    seen[6:] = -1  # no pictures
    changes = {
        "tokens": random.integers(1, 64, (ROWS, 6)).astype(np.int32),
        "segment_ids": np.ones((ROWS, 6), np.int32),
        "tiles": random.integers(0, 256, (ROWS, 1, 16, 16, 3)).astype(np.uint8),
        "visual_index": seen,
    }
    batch = dataclasses.replace(batch, **changes)
    params: Any = model.build().init(jax.random.key(0), batch, {}, method="initialize")["params"]
    params = jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape, np.float32), nn.meta.unbox(params))

    def found(options: dict[str, Any], params: Any, batch: Batch = batch) -> Any:
        return jax.jit(looking_model(**options).build().apply)({"params": params}, batch, {})

    # Rows are drawn apart by what their words say, so that some look.
    streams = found({"tower": False}, params).streams
    given = {"params": params["fusion"]["looks"]}, streams["text"].tokens, streams["text"].mask
    logits: Any = jax.jit(Openings(1).apply)(*given)
    params["fusion"]["looks"]["outer"]["bias"] -= np.sort(np.asarray(logits)[:6, 0])[-3:-1].mean()
    skipping, whole = found({}, params), found({"tower": False}, params)
    assert_same_but_for_rounding(skipping.predictions["kind"], whole.predictions["kind"])
    assert float(whole.gates.tower) == ROWS and float(skipping.gates.tower) == 2
    assert float(skipping.gates.decided.rows[0]) == 6 and float(skipping.gates.decided.open[0]) == 2
    text = found({}, params, without_pictures(batch))
    closed = np.asarray(skipping.gates.decided.by_row[0]) <= 0
    assert_same_but_for_rounding(text.predictions["kind"][closed], whole.predictions["kind"][closed])


def test_a_tower_that_a_head_reads_itself_is_not_left_out():
    model = looking_model()
    assert model.left_out is not None and model.left_out.name == "image"
    both = Classification(("red", "green"), name="kind", field="kind", stream="image")
    reading = dataclasses.replace(model, heads=(both,))
    assert reading.left_out is None and reading.may_lack == model.may_lack == {TILES, TOKENS}
    with pytest.raises(ValueError, match="head 'kind' reads tower 'image' itself; set tower=None"):
        dataclasses.replace(looking_model(tower=True), heads=(both,))
