"""Inputs that a row or a whole batch lacks: as a model without them, and no compute for a whole batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_joint import IMAGE, TEXT, random_batch

from vl_jax import params as params_lib
from vl_jax.batch import TILES, TOKENS, Batch, Given, absent, without, without_absent
from vl_jax.data.sample import Sample
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.data.text.written import encode_written
from vl_jax.fusion.build import Apart
from vl_jax.fusion.mixing import DROPOUT, Mixing
from vl_jax.heads.classification import Classification
from vl_jax.heads.pairs import Pairs
from vl_jax.heads.segmentation import Segmentation
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import abstract
from vl_jax.moe.stacks import init_state
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.step import TrainState, gradients

DEPTH = dataclasses.replace(IMAGE, num_channels=1, num_layers=1, moe=None, sparse_layers=(), pixel_mean=0.0)
KIND = Classification(("red", "green", "blue"), name="kind", field="kind", stream="fused")
TOWERS = (Tower("image", IMAGE), Tower("text", TEXT, TOKENS), Tower("depth", DEPTH, "depth"))
ROWS = 6
CONFIG = JointConfig(TOWERS, (KIND,), Mixing(dim=8))
INPUTS = (TILES, TOKENS, "depth")


def batch_of(
    config: JointConfig = CONFIG, *, lacking: tuple[str, ...] = (), rows: Any = slice(None)
) -> Batch:
    """Rows that have everything, but for what some of them lack."""
    batch = random_batch(config, ROWS)
    random, present = np.random.default_rng(3), np.ones(ROWS, bool)
    depth = random.standard_normal((ROWS, 16, 16, 1)).astype(np.float32)
    if "depth" in lacking:
        present[rows], depth[rows] = False, 0
    changes: dict[str, Any] = {"media": {"depth": Given(depth, present)} if "depth" in batch.media else {}}
    if TILES in lacking:
        for name, value in {"tiles": 0, "visual_index": -1}.items():
            changes[name] = np.array(getattr(batch, name))
            changes[name][rows] = value
    if TOKENS in lacking:
        for name in ("tokens", "segment_ids"):
            changes[name] = np.array(getattr(batch, name))
            changes[name][rows] = 0
    return dataclasses.replace(batch, **changes)


@functools.cache
def params_of(config: JointConfig) -> Any:
    random = np.random.default_rng(1)

    def draw(path: str, leaf: Any) -> jax.Array:
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jnp.asarray(value)

    return params_lib.map_paths(draw, abstract(config))


@functools.partial(jax.jit, static_argnums=0)
def _said(config: JointConfig, params: Any, batch: Batch) -> Any:
    return config.build().apply({"params": params}, batch, init_state(config.stacks)).predictions


def said(batch: Batch, config: JointConfig = CONFIG) -> np.ndarray:
    return np.asarray(_said(config, params_of(CONFIG), batch)["kind"])


def without_towers(*inputs: str) -> JointConfig:
    towers = tuple(tower for tower in TOWERS if tower.input not in inputs)
    return dataclasses.replace(CONFIG, towers=towers)


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_is_absent_is_as_a_model_without_its_tower(name):
    config = without_towers(name)
    expected = said(batch_of(config), config)
    close(said(batch_of(lacking=(name,))), expected)
    close(said(without_absent(batch_of(lacking=(name,)), CONFIG.may_lack)), expected)
    rows = [0, 3]
    found = said(batch_of(lacking=(name,), rows=rows))
    close(found[rows], expected[rows])
    others = [row for row in range(ROWS) if row not in rows]
    close(found[others], said(batch_of())[others])


@pytest.mark.slow
def test_a_batch_that_lacks_everything_says_what_one_of_no_tokens_does():
    batch = batch_of(lacking=INPUTS)
    close(said(without_absent(batch, CONFIG.may_lack)), said(batch))


SUBSETS = [lacking for n in range(3) for lacking in itertools.combinations(INPUTS, n)]


def test_every_subset_that_is_met_has_one_program():
    traced = []

    @jax.jit
    def count(batch: Batch) -> jax.Array:
        traced.append(absent_of(batch))
        return jnp.zeros(())

    def absent_of(batch: Batch) -> frozenset[str]:
        room = {TILES: batch.tiles.shape[1], TOKENS: batch.tokens.shape[1], "depth": "depth" in batch.media}
        return frozenset(name for name, has in room.items() if not has)

    for lacking in (*SUBSETS, *SUBSETS[::-1]):
        count(without_absent(batch_of(lacking=lacking), CONFIG.may_lack))
    assert traced == [frozenset(lacking) for lacking in SUBSETS]
    # What is lacking in some rows alone is no program of its own.
    count(without_absent(batch_of(lacking=("depth",), rows=[0]), CONFIG.may_lack))
    assert len(traced) == len(SUBSETS)


def work(config: JointConfig, batch: Batch) -> float:
    """The operations of a pass and its gradient, as they are lowered."""

    def total(params: Any) -> jax.Array:
        found: Any = config.build().apply({"params": params}, batch, init_state(config.stacks))
        return jnp.sum(found.predictions["kind"] ** 2)

    lowered = jax.jit(jax.grad(total)).lower(params_lib.map_paths(lambda _, x: x, abstract(config)))
    return lowered.cost_analysis()["flops"]  # type: ignore[index]


@pytest.mark.parametrize("name", INPUTS)
def test_nothing_is_computed_for_what_a_whole_batch_lacks(name):
    config = without_towers(name)
    found = work(CONFIG, without_absent(batch_of(lacking=(name,)), CONFIG.may_lack))
    expected, whole = work(config, batch_of(config)), work(CONFIG, batch_of())
    assert whole > 1.05 * expected
    # What is left beside: zeros for the gradients of the tower that was not run.
    assert expected <= found <= 1.001 * expected


@pytest.mark.slow
def test_a_step_without_an_input_is_that_of_the_whole_program():
    lacking = batch_of(lacking=("depth",))
    params = params_of(CONFIG)
    options: dict[str, Any] = {
        "model": CONFIG.build(),
        "trainable": set(params_lib.flatten(params)),
        "accumulation": 1,
        "objective": Heads(("kind",)),
    }

    @jax.jit
    def step(params: Any, batch: Batch) -> Any:
        state = TrainState(jnp.zeros((), jnp.int32), params, None, init_state(CONFIG.stacks))
        return gradients(state, batch, **options)[:2]

    (whole, figures), (found, own) = (
        jax.device_get(step(params, batch)) for batch in (lacking, without_absent(lacking, CONFIG.may_lack))
    )
    close(own["loss"], figures["loss"])
    jax.tree.map(close, found, whole)
    assert not any(grad.any() for grad in jax.tree.leaves(found["depth"]))


def test_training_hides_modalities_wherever_a_row_stands():
    config = dataclasses.replace(CONFIG, fusion=Mixing(dim=8, dropout=0.5))
    assert config.draws == (DROPOUT,)

    @jax.jit
    def hidden(params: Any, batch: Batch) -> Any:
        rngs = {DROPOUT: jax.random.key(0)}
        return config.build().apply({"params": params}, batch, init_state(config.stacks), rngs=rngs).weights

    batch, order = batch_of(), np.array([3, 1, 0, 2, 5, 4])
    found = np.asarray(hidden(params_of(CONFIG), batch).present)
    assert 0 < found.mean() < 1 and found.any(axis=1).all()
    moved = jax.tree.map(lambda x: x[order], batch)
    np.testing.assert_array_equal(hidden(params_of(CONFIG), moved).present, found[order])


def test_inputs_that_a_head_needs_are_never_lacking():
    assert CONFIG.may_lack == set(INPUTS)
    assert dataclasses.replace(CONFIG, fusion=Apart(), heads=(Pairs(dim=8),)).may_lack == set(INPUTS)
    maps = Segmentation(("a", "b"), name="areas")
    assert dataclasses.replace(CONFIG, heads=(KIND, maps)).may_lack == {TOKENS, "depth"}


def test_what_a_host_batch_lacks():
    assert absent(batch_of()) == frozenset()
    assert absent(batch_of(lacking=(TOKENS, "depth"))) == {TOKENS, "depth"}
    assert without(batch_of(), ("depth",)).media == {}
    batch = batch_of(lacking=(TILES,))
    assert without_absent(batch, ("depth",)) is not None and without(batch, ()) is batch
    assert without(batch, (TOKENS,)).segment_ids.shape == (ROWS, 0)


def test_a_sample_without_words_has_no_text_where_a_model_can_do_without():
    assert CONFIG.spec().wordless and not dataclasses.replace(CONFIG, towers=TOWERS[:1]).spec().wordless
    tokenizer, picture = load_tokenizer(), Sample("a", images=(), turns=())
    assert len(encode_written(picture, tokenizer, max_tokens=8).tokens) == 1
    assert len(encode_written(picture, tokenizer, max_tokens=8, wordless=True).tokens) == 0
