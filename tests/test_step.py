"""The training step gives the same numbers on any mesh, with or without accumulation and remat."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from pallas import TRITON_WARNING, tracing_for

from vl_jax import losses, sharding
from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.layout import init_params, put_batch
from vl_jax.model import LANGUAGE, VisionLanguage, VisionLanguageConfig
from vl_jax.moe.stacks import update_state
from vl_jax.sharding import MeshConfig
from vl_jax.train.objectives.objective import Sums
from vl_jax.train.objectives.rows import split_rows
from vl_jax.train.step import TrainState, gradients, make_train_step

ROWS = 16
ONE = MeshConfig(1, 1, 1, 1)
MESHES = {
    "fsdp2-expert2-tensor2": MeshConfig(1, 2, 2, 2),
    "data2-expert4": MeshConfig(2, 1, 4, 1),
    "data2-fsdp2-tensor2": MeshConfig(2, 2, 1, 2),
}


def text_alone(model: VisionLanguageConfig) -> VisionLanguageConfig:
    """The same without encoder: far less to compile where pictures make no difference."""
    return dataclasses.replace(model, encoder=None)


def rows_of(model: VisionLanguageConfig) -> Batch:
    """Varied rows; for a model without encoder, of tokens alone."""
    batch = tiny.varied_batch(ROWS, fusion=model.fusion.kind)
    if model.encoder is not None:
        return batch
    tokens = np.random.default_rng(0).integers(4, tiny.VOCAB, batch.tokens.shape).astype(np.int32)
    return batch.replace(tokens=tokens, visual_slot=np.full_like(batch.visual_slot, -1))


@functools.cache
def results(
    model: VisionLanguageConfig, mesh: MeshConfig = ONE, *, accumulation: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, float], Any]:
    """(gradients, losses, routing statistics) of one batch of varied rows, on the host."""
    devices = np.prod([mesh.data, mesh.fsdp, mesh.expert, mesh.tensor])
    layout = tiny.layout_of(model, mesh, devices=devices)
    params, routing = tiny.build(model)
    params = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), params, layout.params)
    routing = jax.device_put(jax.tree.map(np.asarray, routing), layout.replicated)
    batch = put_batch(rows_of(model), layout)
    paths = set(params_lib.flatten(params))

    @jax.jit
    def compute(params: Any, routing: Any, batch: Any) -> Any:
        state = TrainState(step=0, params=params, optimizer=None, routing=routing)
        options = {"model": layout.model, "trainable": paths, "accumulation": accumulation}
        grads, metrics, sums = gradients(state, batch, **options)
        return grads, metrics, sums.stats

    with sharding.use_mesh(layout.mesh, layout.rules):
        grads, metrics, stats = jax.device_get(compute(params, routing, batch))
    return params_lib.flatten(grads), metrics, stats


def assert_same(actual: Any, expected: Any) -> None:
    """Equal up to the order of additions in float32; what is counted is equal exactly.

    Gradients are compared by norm, as some elements are sums of terms that cancel: 1e-5 for all leaves
    together. Moving every parameter by its last bit moves single leaves of this model by 1.5e-5; two programs
    may differ by twice that.
    """
    grads, metrics, counted = actual
    expected_grads, expected_metrics, expected_counted = expected
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert grads.keys() == expected_grads.keys()
    norm = {p: np.linalg.norm(g) for p, g in expected_grads.items()}
    error = {p: np.linalg.norm(g - grads[p]) for p, g in expected_grads.items()}
    assert np.hypot.reduce(list(error.values())) <= 1e-5 * np.hypot.reduce(list(norm.values()))
    assert not {p: (error[p], norm[p]) for p in norm if error[p] > 3e-5 * norm[p]}
    stats, expected_stats = counted[LANGUAGE], expected_counted[LANGUAGE]
    for name in ("load", "tokens", "dropped"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(expected_stats, name), err_msg=name)
    np.testing.assert_allclose(stats.importance, expected_stats.importance, rtol=1e-5)


@pytest.mark.slow
def test_loss_gradients_and_statistics_are_those_of_one_device():
    model = tiny.config()
    assert_same(results(model, MESHES["fsdp2-expert2-tensor2"]), results(model))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["capacity", "expert_choice"])
def test_rows_that_compete_for_experts_on_a_mesh_equal_one_device(scheme):
    model = text_alone(tiny.config(scheme))
    assert_same(results(model, MESHES["fsdp2-expert2-tensor2"]), results(model))


@pytest.mark.slow
def test_the_gated_model_on_a_mesh_equals_one_device():
    model = tiny.config("top_k", fusion="gated")
    assert_same(results(model, MESHES["data2-fsdp2-tensor2"]), results(model))


def test_four_micro_batches_equal_one_batch():
    model = tiny.config()
    assert_same(results(model, accumulation=4), results(model))


def spread_micro_batches(remat: str) -> Any:
    """Results on eight devices, in micro-batches, of which much is computed a second time."""
    mesh = MESHES["fsdp2-expert2-tensor2" if remat == "full" else "data2-expert4"]
    return results(tiny.config(remat=remat), mesh, accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_in_micro_batches_on_a_mesh_changes_nothing(remat):
    assert_same(spread_micro_batches(remat), results(tiny.config()))


@pytest.mark.slow
def test_the_routing_bias_after_a_step_is_the_same_however_it_was_computed():
    model = tiny.config()
    state = tiny.build(model)[1]
    ways = (
        results(model),
        results(model, accumulation=4),
        results(model, MESHES["fsdp2-expert2-tensor2"]),
        spread_micro_batches("full"),
        spread_micro_batches("dots"),
    )
    biases = [np.asarray(update_state(state, way[2], model.stacks)[LANGUAGE]["bias"]) for way in ways]
    assert not np.array_equal(biases[0], state[LANGUAGE]["bias"])
    for bias in biases[1:]:
        np.testing.assert_array_equal(bias, biases[0])


@pytest.mark.slow
def test_fresh_parameters_do_not_depend_on_the_mesh():
    model = tiny.config()
    one = tiny.layout_of(model)
    many = tiny.layout_of(model, MESHES["fsdp2-expert2-tensor2"], devices=8)
    example = tiny.varied_batch(8)
    same, other = (params_lib.flatten(init_params(layout, example, seed=5)) for layout in (one, many))
    for path, leaf in same.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)
    assert other["language/moe_layers/moe/w_in"].sharding.spec[1] == "expert"


def test_micro_batches_take_every_row_once_and_none_changes_its_device():
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(ROWS))
    micro = split_rows(batch, 4)
    assert micro.tokens.shape == (4, 4, 24)
    for part in range(4):
        np.testing.assert_array_equal(micro.tokens[part], batch.tokens[part::4])


@pytest.mark.slow
def test_the_loss_is_the_mean_over_weighted_targets():
    model = tiny.config()
    batch = tiny.varied_batch(ROWS)
    logits = np.take_along_axis(tiny.logits(model, batch), batch.target_index[..., None], axis=1)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    chance = np.take_along_axis(shifted / shifted.sum(-1, keepdims=True), batch.targets[..., None], axis=2)
    expected = -(np.log(chance[..., 0]) * batch.loss_weights).sum() / batch.loss_weights.sum()
    np.testing.assert_allclose(results(model)[1]["loss"], expected, rtol=1e-5)


def test_cross_entropy_of_hand_worked_values():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]))
    nll, hit = losses.cross_entropy(logits, jnp.array([[0, 1]]))
    np.testing.assert_allclose(nll, [[np.log(2), np.log(4)]], rtol=1e-6)
    np.testing.assert_array_equal(hit, [[1.0, 0.0]])


def test_frozen_leaves_are_bit_identical_after_steps_and_trained_ones_move():
    model = tiny.config()
    params, routing = tiny.build(model)
    trained_paths = params_lib.select(params, ("adapter/.*", ".*/router"))
    optimizer = optax.adamw(1.0)
    trained, _ = params_lib.split(params, trained_paths)
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), routing)
    step = jax.jit(make_train_step(VisionLanguage(model), optimizer, trainable=trained_paths))
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(ROWS))
    for _ in range(2):
        state, metrics = step(state, batch, 0.1)
    assert int(state.step) == 2 and float(metrics["grad_norm"]) > 0
    for path, leaf in params_lib.flatten(state.params).items():
        unchanged = np.array_equal(leaf, params_lib.flatten(params)[path])
        assert unchanged == (path not in trained_paths), path


@pytest.mark.filterwarnings(TRITON_WARNING)
@pytest.mark.slow
def test_the_whole_step_lowers_for_a_gpu_that_is_absent():
    model = tiny.config()
    params, routing = tiny.build(model)
    optimizer, paths = optax.adamw(1.0), set(params_lib.flatten(params))
    step = make_train_step(VisionLanguage(model), optimizer, trainable=paths)

    def run(params: Any, moments: Any, routing: Any, batch: Batch) -> TrainState:
        return step(TrainState(jnp.zeros((), jnp.int32), params, moments, routing), batch, 0.1)[0]

    with tracing_for("NVIDIA H200"):
        traced = jax.jit(run).trace(params, optimizer.init(params), routing, tiny.varied_batch(ROWS))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    # The sparse layers are one loop: two products forward, and four backward.
    assert program.count("__gpu$xla.gpu.triton") == 6


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A number drawn from the key of the noise of routing."""

    couples_rows = False
    weights = {"drawn": 1.0}  # noqa: RUF012

    def total(self, batch: Any) -> dict[str, jax.Array]:
        return {"drawn": jnp.float32(1.0)}

    def __call__(self, params: Any, state: Any, batch: Any, *, model: Any, rngs: Any) -> Sums:
        return Sums({"drawn": params["w"] * jax.random.uniform(rngs["routing"])}, {}, jnp.zeros(()))


def test_the_noise_of_routing_follows_from_seed_and_step():
    config = tiny.config("top_k")
    noisy = dataclasses.replace(config, moe=dataclasses.replace(config.moe, scheme="v_moe"))
    model, batch = VisionLanguage(noisy), jax.tree.map(jnp.asarray, tiny.varied_batch(1))

    def drawn(seed: int, step: int) -> float:
        state = TrainState(step=step, params={"w": jnp.float32(1.0)}, optimizer=None, routing={})
        options = {"model": model, "trainable": {"w"}, "accumulation": 1, "objective": Drawn()}
        return float(gradients(state, batch, **options, seed=seed)[1]["loss"])

    assert drawn(0, 3) == drawn(0, 3) == float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), 3)))
    assert len({drawn(seed, step) for seed in (0, 1) for step in (0, 1)}) == 4
