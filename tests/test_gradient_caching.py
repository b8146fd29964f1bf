"""Gradient caching: a contrastive batch in micro-batches has the loss and the gradient of the whole batch."""

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
from vl_jax.heads.pairs import PairVectors
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.step import TrainState

ROWS, WIDTH, PARTS = 32, 6, 2
IDS = np.arange(ROWS, dtype=np.int32) // 2 * 2  # every picture twice, in different micro-batches


class Towers(nn.Module):
    """Two towers of a layer each, with noise or with statistics of the batch where asked."""

    noise: float = 0.0
    statistics: str = ""  # "frozen" or "moving"

    @nn.compact
    def __call__(self, batch: Batch, routing: Any) -> Any:
        x = batch.media["x"].values
        if self.noise:
            x = x + self.noise * jax.random.normal(self.make_rng("routing"), x.shape)
        if self.statistics:
            mean = self.variable("batch_stats", "mean", jnp.zeros, WIDTH)
            x = x - mean.value
            if self.statistics == "moving":
                mean.value = 0.5 * mean.value + 0.5 * jnp.mean(x, axis=0)
        sides = [jnp.tanh(nn.Dense(WIDTH, name=name)(x)) for name in ("image", "text")]
        image, text = (side / jnp.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        scale = self.param("scale", nn.initializers.constant(1.0), ())
        bias = self.param("bias", nn.initializers.constant(-2.0), ())
        pairs = PairVectors(image, text, scale, bias)
        return types.SimpleNamespace(predictions={"pairs": pairs}, routed={})


def rows() -> Batch:
    letters = ("T", "Q", "S", "M", "h", "w", "c")
    x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    present = np.arange(ROWS) != 5
    batch = dataclasses.replace(
        blank(dict.fromkeys(letters, 1), ROWS),
        media={"x": Given(x, present)},
        labels={"pairs": Given(IDS, present)},
    )
    return jax.tree.map(jnp.asarray, batch)


def state_of(model: Towers) -> TrainState:
    made = dict(model.init({"params": jax.random.key(0), "routing": jax.random.key(1)}, rows(), {}))
    return TrainState(jnp.zeros((), jnp.int32), made.pop("params"), None, {}, collections=made)


def loss(objective: ContrastivePairs, model: Towers, state: TrainState, batch: Batch, params: Any) -> Any:
    rngs = {"routing": jax.random.key(2)}
    return objective(params, state, batch, model=model, rngs=rngs).losses["pairs/loss"] / ROWS


def value(objective: ContrastivePairs, model: Towers, mesh: Any = None) -> Any:
    state, batch = state_of(model), rows()

    def compute(params: Any, batch: Batch) -> Any:
        return jax.value_and_grad(lambda p: loss(objective, model, state, batch, p))(params)

    if mesh is None:
        return jax.jit(compute)(state.params, batch)
    with sharding.use_mesh(mesh):
        spread = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
        return jax.jit(compute)(state.params, jax.device_put(batch, spread))


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.parametrize("form, devices", [("softmax", 1), ("sigmoid", 8)])
@pytest.mark.slow
def test_micro_batches_have_the_gradient_of_the_whole_batch(form: Any, devices: int):
    expected = value(ContrastivePairs(loss=form, chunk=8), Towers())
    cached = ContrastivePairs(loss=form, chunk=8, micro_batches=PARTS)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2)) if devices == 8 else None
    assert_close(value(cached, Towers(), mesh), expected)


@pytest.mark.slow
def test_both_passes_draw_the_same_numbers():
    """The gradient is the slope of the loss itself; with new noise in the second pass it would not be."""
    model = Towers(noise=1.0)
    state, batch = state_of(model), rows()
    objective = ContrastivePairs(micro_batches=PARTS)

    def of(params: Any) -> jax.Array:
        return loss(objective, model, state, batch, params)

    gradient, compute = jax.jit(jax.grad(of))(state.params), jax.jit(of)
    step = jax.tree.map(lambda g: 3e-3 * g, gradient)
    ahead, behind = (jax.tree.map(move, state.params, step) for move in (jnp.add, jnp.subtract))
    rise = float(compute(ahead)) - float(compute(behind))
    square = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient))
    assert rise == pytest.approx(2 * 3e-3 * square, rel=1e-2)


def test_the_noise_of_micro_batches_differs():
    model, objective = Towers(noise=1.0), ContrastivePairs(micro_batches=PARTS)
    state, batch = state_of(model), rows()
    same = batch.replace(media={"x": Given(jnp.zeros((ROWS, WIDTH)), jnp.ones(ROWS, bool))})
    options = {"model": model, "rngs": {"routing": jax.random.key(2)}}
    pairs, _ = objective._in_parts(state.params, state, same, **options)[0]
    assert not np.allclose(pairs.image[0::2], pairs.image[1::2])


def test_statistics_that_move_are_refused_and_frozen_ones_are_not():
    objective = ContrastivePairs(micro_batches=PARTS)

    def trace(model: Towers) -> Any:
        state = state_of(model)
        return jax.eval_shape(
            lambda params, state: loss(objective, model, state, rows(), params), state.params, state
        )

    assert trace(Towers(statistics="frozen")).shape == ()
    with pytest.raises(ValueError, match=r"micro_batches=2: batch_stats/mean is made of all rows of a batch"):
        trace(Towers(statistics="moving"))


def test_the_model_never_sees_more_than_a_micro_batch():
    state, batch = state_of(Towers()), rows()

    def rows_of_products(parts: int) -> int:
        objective = ContrastivePairs(chunk=1, micro_batches=parts)
        text = str(
            jax.make_jaxpr(jax.grad(lambda p: loss(objective, Towers(), state, batch, p)))(state.params)
        )
        lines = [line for line in text.splitlines() if "= tanh" in line]
        return max(int(line.split("f32[")[1].split(",")[0]) for line in lines)

    assert rows_of_products(1) == ROWS and rows_of_products(4) == ROWS // 4


def test_micro_batches_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="micro_batches=0 must be >= 1"):
        ContrastivePairs(micro_batches=0)
    state = state_of(Towers())
    with pytest.raises(ValueError, match="micro_batches=3 does not divide the 32 rows of a batch"):
        loss(ContrastivePairs(micro_batches=3), Towers(), state, rows(), state.params)
