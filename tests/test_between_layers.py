"""Trunks that look at one another after every layer: as separate towers at first, gated by the words."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_absent import DEPTH, ROWS, TEXT, batch_of
from test_joint import IMAGE, TRUNK

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import TILES, TOKENS, Batch, without_absent
from vl_jax.fusion.between_layers import BetweenLayers, Interactions
from vl_jax.fusion.build import Apart
from vl_jax.heads.classification import Classification
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import abstract, plan_layout, put_batch
from vl_jax.sharding import MeshConfig, make_mesh

PICTURE = dataclasses.replace(IMAGE, moe=None, sparse_layers=())
TOWERS = (
    Tower("image", PICTURE),
    Tower("text", dataclasses.replace(TEXT, num_layers=2, embed_dim=24), TOKENS),
    Tower("depth", dataclasses.replace(DEPTH, num_layers=2), "depth"),
)
HEADS = (
    Classification(("red", "green", "blue"), name="kind", field="kind", stream="text"),
    Pairs(dim=8, image="image", text="depth"),
)
CONFIG = JointConfig(TOWERS, HEADS, BetweenLayers(num_heads=2, head_dim=4))


@functools.cache
def params_of(config: JointConfig, *, closed: bool = False) -> Any:
    """Random parameters; those that open the looks are at their initial zero if closed."""
    random = np.random.default_rng(1)

    def draw(path: str, leaf: Any) -> jax.Array:
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jnp.asarray(value * (0 if closed and path.endswith("opening") else 1))

    return params_lib.map_paths(draw, abstract(config))


@functools.partial(jax.jit, static_argnums=0)
def _output(config: JointConfig, params: Any, batch: Batch) -> Any:
    found: Any = config.build().apply({"params": params}, batch, {})
    return found.predictions, found.weights


def said(batch: Batch, config: JointConfig = CONFIG, **options: Any) -> dict[str, np.ndarray]:
    found = jax.device_get(_output(config, params_of(CONFIG, **options), batch)[0])
    return {"kind": found["kind"], "image": found["pairs"].image, "depth": found["pairs"].text}


def close(found: dict[str, Any], expected: dict[str, Any], rows: Any = slice(None)) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name][rows], value[rows], rtol=1e-6, atol=2e-6, err_msg=name)


def test_closed_looks_are_separate_towers_whose_parameters_have_the_same_names():
    apart = dataclasses.replace(CONFIG, fusion=Apart())
    inside = params_lib.flatten(params_of(CONFIG))
    assert {path for path in inside if not path.startswith("fusion/")} == set(
        params_lib.flatten(abstract(apart))
    )
    expected = said(batch_of(), apart)
    close(said(batch_of(), closed=True), expected)
    opened = said(batch_of())
    for name, value in expected.items():
        assert np.abs(opened[name] - value).max() > 1e-3, name


def without_tower(name: str) -> JointConfig:
    towers = tuple(tower for tower in TOWERS if tower.input != name)
    heads = HEADS[:1] if name != TOKENS else HEADS[1:]
    return dataclasses.replace(CONFIG, towers=towers, heads=heads)


@pytest.mark.parametrize("name", [TILES, "depth"])
def test_an_absent_modality_is_as_a_model_without_its_tower(name):
    config = without_tower(name)
    expected = np.asarray(_output(config, params_of(CONFIG), batch_of(config))[0]["kind"])
    lacking = batch_of(lacking=(name,))
    for batch in (lacking, without_absent(lacking, CONFIG.may_lack)):
        close({"kind": said(batch)["kind"]}, {"kind": expected})
    rows, others = [0, 3], [1, 2, 4, 5]
    found = said(batch_of(lacking=(name,), rows=rows))
    close({"kind": found["kind"]}, {"kind": expected}, rows)
    close({"kind": found["kind"]}, {"kind": said(batch_of())["kind"]}, others)


@pytest.mark.slow
def test_without_words_every_row_has_the_same_gates_and_the_others_look_on():
    lacking = batch_of(lacking=(TOKENS,))
    whole, without = (
        _output(CONFIG, params_of(CONFIG), b) for b in (lacking, without_absent(lacking, (TOKENS,)))
    )
    for name in ("image", "text"):
        np.testing.assert_allclose(
            getattr(whole[0]["pairs"], name), getattr(without[0]["pairs"], name), atol=2e-6
        )
    values = np.asarray(without[1].values)
    assert without[1].names == ("image", "depth") and np.ptp(values, axis=0).max() < 1e-6 and values.min() > 0


def test_gates_follow_the_words_and_are_told_by_modality():
    weights = _output(CONFIG, params_of(CONFIG), batch_of())[1]
    assert weights.names == ("image", "text", "depth") and np.asarray(weights.present).all()
    values = np.asarray(weights.values)
    assert values.shape == (ROWS, 3) and (values > 0).all() and (values < 1).all()
    assert np.ptp(values, axis=0).min() > 1e-3  # texts differ, so gates do
    lacking = _output(CONFIG, params_of(CONFIG), batch_of(lacking=("depth",), rows=[2]))[1]
    np.testing.assert_array_equal(np.asarray(lacking.present)[:, 2], np.arange(ROWS) != 2)
    assert not np.asarray(_output(CONFIG, params_of(CONFIG, closed=True), batch_of())[1].values).any()


@pytest.mark.slow
def test_flow_counts_more_where_the_words_speak_of_motion():
    """The class is in the picture or in the flow: the words say in which. The looks begin closed."""
    module, rows, width = Interactions(BetweenLayers(num_heads=2, head_dim=8)), 256, 8
    random = np.random.default_rng(0)
    asked, means = (jnp.asarray(random.standard_normal((2, width)), jnp.float32) for _ in range(2))

    def draw(key: jax.Array) -> tuple[dict[str, Any], jax.Array, jax.Array]:
        keys, here = jax.random.split(key, 4), jnp.ones((rows, 1), bool)
        motion = jax.random.bernoulli(keys[0], shape=(rows,)).astype(jnp.int32)
        classes = jax.random.bernoulli(keys[1], shape=(2, rows)).astype(jnp.int32)
        tokens = means[classes] + 0.2 * jax.random.normal(keys[2], (2, rows, width))
        text = asked[motion] + 0.2 * jax.random.normal(keys[3], (rows, width))
        trunks = {"text": text, "image": tokens[0], "flow": tokens[1]}
        label = jnp.where(motion == 1, classes[1], classes[0])
        return {name: (x[:, None], here) for name, x in trunks.items()}, label, motion

    def loss(params: Any, key: jax.Array) -> jax.Array:
        trunks, label, _ = draw(key)
        after, _ = module.apply({"params": params["fusion"]}, 0, trunks)
        logits = after["text"][:, 0] @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    @jax.jit
    def learned(key: jax.Array) -> Any:
        trunks, _, motion = draw(jax.random.fold_in(key, 1))
        fusion = sharding.nn.meta.unbox(module.init(key, 0, trunks)["params"])
        params, optimizer = {"fusion": fusion, "head": jnp.zeros((width, 2))}, optax.adam(1e-2)

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        with jax.numpy_dtype_promotion("standard"):
            carry = params, optimizer.init(params)
            (params, _), losses = jax.lax.scan(step, carry, jax.random.split(key, 600))
        return module.apply({"params": params["fusion"]}, 0, trunks)[1], motion, losses

    gates, motion, losses = jax.device_get(learned(jax.random.key(0)))
    assert losses[-50:].mean() < 0.5 * losses[:50].mean()
    of_motion, of_colour = ({n: g[motion == m].mean() for n, g in gates.items()} for m in (1, 0))
    assert of_motion["flow"] > 1.2 * of_colour["flow"] and of_colour["image"] > 1.2 * of_motion["image"]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["remat", "devices"])
def test_remat_and_eight_devices_change_nothing(change):
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:2]]), batch_of(lacking=("depth",), rows=[1]))

    def compute(config: JointConfig, params: Any, batch: Batch) -> Any:
        def total(params: Any) -> jax.Array:
            found: Any = config.build().apply({"params": params}, batch, {})
            return jnp.sum(found.predictions["kind"] ** 2)

        return jax.value_and_grad(total)(params)

    expected = jax.device_get(jax.jit(functools.partial(compute, CONFIG))(params_of(CONFIG), batch))
    if change == "remat":
        config = dataclasses.replace(CONFIG, remat=True)
        found = jax.device_get(jax.jit(functools.partial(compute, config))(params_of(CONFIG), batch))
    else:
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices=jax.devices()[:8])
        layout = plan_layout(CONFIG, CONFIG.smallest_batch(8), mesh)
        params = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), params_of(CONFIG), layout.params
        )
        with sharding.use_mesh(layout.mesh, layout.rules):
            placed = put_batch(batch, layout)
            found = jax.device_get(jax.jit(functools.partial(compute, CONFIG))(params, placed))
    largest = max(np.abs(grad).max() for grad in jax.tree.leaves(expected[1]))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * largest)
    looking = params_lib.flatten(expected[1])
    assert all(np.abs(grad).max() > 0 for path, grad in looking.items() if "text_at_" in path)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ((Tower("image", TRUNK), *TOWERS[1:]), "tower 'image' is a ResNetConfig; expected a ViTConfig or"),
        (
            (Tower("image", IMAGE), *TOWERS[1:]),
            "tower 'image' is a ViTConfig; expected .* without",
        ),
        ((*TOWERS[:2], Tower("depth", DEPTH, "depth")), "have image 2, text 2, depth 1 layers"),
        ((TOWERS[0], TOWERS[2]), "fusion.words='text' is no tower; there are: image, depth"),
    ],
)
def test_towers_that_cannot_go_together_are_refused(towers, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, towers=towers)
