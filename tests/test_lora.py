"""Adapters: training begins with the model itself, moves nothing but them, and ends in ordinary weights."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_step import MESHES, ONE, ROWS

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.layout import Variables, put_batch
from vl_jax.model import VisionLanguage
from vl_jax.roles import Role
from vl_jax.sharding import MeshConfig
from vl_jax.train import lora, saved
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import GROUPS, LoraConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.saved import Position
from vl_jax.train.stages import Stage, adapter_shapes, trainable_table
from vl_jax.train.step import TrainState, gradients

pytestmark = pytest.mark.slow  # whole runs with adapters: minutes of compilation

MODEL = tiny.config()
STEP = 2e-4  # of finite differences: so small that no token of this model chooses other experts
EVERY = LoraConfig(rank=3, alpha=6.0, targets=tuple(GROUPS))

# Path, shape and role of a weight of every kind; x W; x a; (x a) b.
KINDS = {
    "layers/attention/query": (
        (2, 5, 2, 4),
        Role((-3,), (-2, -1)),
        "ltd,ldnh->ltnh",
        "ltd,ldr->ltr",
        "ltr,lrnh->ltnh",
    ),
    "layers/attention/key": (
        (2, 5, 2, 4),
        Role((-3,), (-2, -1)),
        "ltd,ldnh->ltnh",
        "ltd,ldr->ltr",
        "ltr,lrnh->ltnh",
    ),
    "layers/attention/kv_up": (
        (2, 2, 4, 5),
        Role((-1,), (-3, -2)),
        "ltd,lnhd->ltnh",
        "ltd,ldr->ltr",
        "ltr,lrnh->ltnh",
    ),
    "layers/attention/output": (
        (2, 3, 4, 5),
        Role((-3, -2), (-1,)),
        "ltnh,lnhd->ltd",
        "ltnh,lnhr->ltr",
        "ltr,lrd->ltd",
    ),
    "layers/gate/output": (
        (2, 3, 4, 5),
        Role((-3, -2), (-1,)),
        "ltnh,lnhd->ltd",
        "ltnh,lnhr->ltr",
        "ltr,lrd->ltd",
    ),
    "layers/attention/kv_down/kernel": (
        (2, 5, 7),
        Role((-2,), (-1,)),
        "ltd,ldf->ltf",
        "ltd,ldr->ltr",
        "ltr,lrf->ltf",
    ),
    "blocks/attention/qkv": (
        (2, 5, 3, 2, 4),
        Role((-4,), (-3, -2, -1)),
        "ltd,ldxnh->ltxnh",
        "ltd,ldr->ltr",
        "ltr,lrxnh->ltxnh",
    ),
    "blocks/attention/project": (
        (2, 3, 4, 5),
        Role((-3, -2), (-1,)),
        "ltnh,lnhd->ltd",
        "ltnh,lnhr->ltr",
        "ltr,lrd->ltd",
    ),
    "layers/mlp/w_in": (
        (2, 5, 2, 6),
        Role((-3,), (-1,)),
        "ltd,ldxf->ltxf",
        "ltd,lxdr->ltxr",
        "ltxr,lxrf->ltxf",
    ),
    "layers/mlp/w_out": ((2, 6, 5), Role((-2,), (-1,)), "ltf,lfd->ltd", "ltf,lfr->ltr", "ltr,lrd->ltd"),
    "layers/moe/w_in": (
        (2, 3, 5, 2, 6),
        Role((-3,), (-1,)),
        "letd,ledxf->letxf",
        "letd,lexdr->letxr",
        "letxr,lexrf->letxf",
    ),
    "layers/moe/w_out": (
        (2, 3, 6, 5),
        Role((-2,), (-1,)),
        "letf,lefd->letd",
        "letf,lefr->letr",
        "letr,lerd->letd",
    ),
    "adapter/layer_0/kernel": ((5, 7), Role((-2,), (-1,)), "td,df->tf", "td,dr->tr", "tr,rf->tf"),
    "encoder/stem/kernel": (
        (2, 2, 3, 5),
        Role((-4, -3, -2), (-1,)),
        "thwc,hwcd->td",
        "thwc,hwcr->tr",
        "tr,rd->td",
    ),
}


LAYOUT = tiny.layout_of(MODEL)


def merged(params: Any, adapters: Any, scale: float = EVERY.scale) -> Any:
    return lora.merge(params, adapters, scale, LAYOUT.roles)


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def filled(adapters: Any, scale: float = 0.1) -> Any:
    """Adapters of which no factor is zero."""
    leaves, treedef = jax.tree.flatten(adapters)
    factors = (np.asarray(normal(100 + i, leaf.shape)) for i, leaf in enumerate(leaves))
    return treedef.unflatten([jnp.asarray(np.float32(scale) * x) for x in factors])


def assert_equal(actual: Any, expected: Any) -> None:
    actual, expected = params_lib.flatten(actual), params_lib.flatten(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf, err_msg=path)


def changed(before: Any, after: Any) -> set[str]:
    before, after = params_lib.flatten(before), params_lib.flatten(after)
    assert before.keys() == after.keys()
    return {path for path in before if not np.array_equal(before[path], after[path])}


def assert_moved_by_the_rate(before: Any, after: Any, *, steps: int) -> None:
    """Each bias up or down by the rate at each step, or not at all where the load is the mean."""
    moves = np.asarray(after - before) / MODEL.moe.balance.bias_rate
    np.testing.assert_allclose(moves, np.round(moves), atol=1e-3)
    assert np.any(moves) and np.max(np.abs(moves)) < steps + 0.5


@pytest.mark.parametrize("path", KINDS)
def test_a_merged_weight_does_what_the_weight_and_its_adapter_do(path):
    shape, role, whole, down, up = KINDS[path]
    config = LoraConfig(rank=3, alpha=6.0, targets=(path,))
    params = params_lib.unflatten({path: normal(1, shape)})
    adapters = filled(lora.shapes(config, params, {path: role}), scale=1.0)
    (a, b) = (params_lib.flatten(adapters)[f"{path}/{name}"] for name in "ab")
    sizes = dict(zip(whole.split("->")[0].split(",")[1], shape, strict=True))
    x = normal(2, tuple(sizes.get(axis, 4) for axis in whole.split(",")[0]))
    weight = params_lib.flatten(params)[path]
    merge = jax.jit(functools.partial(lora.merge, scale=config.scale, roles={path: role}))
    found = params_lib.flatten(merge(params, adapters))[path]
    expected = np.einsum(whole, x, weight) + 2.0 * np.einsum(up, np.einsum(down, x, a), b)
    np.testing.assert_allclose(np.einsum(whole, x, found), expected, rtol=1e-4, atol=1e-4)


def test_every_matrix_of_the_model_is_in_one_of_the_groups():
    matrices = {path for path, role in LAYOUT.roles.items() if role.is_matrix}
    assert set(lora.select(EVERY, LAYOUT.params, LAYOUT.roles)) == matrices
    assert "language/head/kernel" not in matrices


def test_fresh_adapters_leave_the_model_as_it_is():
    params, _ = tiny.build(MODEL)
    adapters = jax.jit(functools.partial(lora.init, EVERY, params, LAYOUT.roles))(jax.random.key(0))
    assert all(np.any(leaf) == path.endswith("/a") for path, leaf in params_lib.flatten(adapters).items())
    assert_equal(jax.jit(merged)(params, adapters), params)


def test_weights_in_half_precision_keep_their_dtype():
    params, roles = (
        {"fc": {"kernel": normal(0, (4, 4)).astype(jnp.bfloat16)}},
        {"fc/kernel": Role((0,), (1,))},
    )
    config = LoraConfig(rank=2, alpha=2.0, targets=("fc/kernel",))
    factors = filled(lora.shapes(config, params, roles), scale=1.0)["fc"]["kernel"]
    found = lora.merge(params, {"fc": {"kernel": factors}}, 1.0, roles)["fc"]["kernel"]
    expected = params["fc"]["kernel"].astype(jnp.float32) + factors["a"] @ factors["b"]
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@functools.cache
def adapted_gradients(mesh: MeshConfig = ONE, accumulation: int = 1) -> dict[str, np.ndarray]:
    """Gradients of filled adapters on every matrix, and of the newline vector, on the host."""
    layout = tiny.layout_of(MODEL, mesh, devices=int(np.prod(dataclasses.astuple(mesh))))
    params, routing = jax.tree.map(np.asarray, tiny.build(MODEL))
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, layout.params)
    routing = jax.device_put(routing, layout.replicated)
    shapes = lora.shapes(EVERY, layout.params, layout.roles)
    adapters = jax.tree.map(
        lambda x, like: jax.device_put(np.asarray(x), like.sharding), filled(shapes), shapes
    )
    batch = put_batch(tiny.varied_batch(ROWS), layout)

    @jax.jit
    def compute(params: Any, adapters: Any, routing: Any, batch: Any) -> Any:
        state = TrainState(0, params, None, routing, adapters)
        return gradients(
            state,
            batch,
            model=layout.model,
            trainable={"adapter/newline"},
            accumulation=accumulation,
            lora_scale=EVERY.scale,
            roles=layout.roles,
        )[0]

    with sharding.use_mesh(layout.mesh, layout.rules):
        return params_lib.flatten(jax.device_get(compute(params, adapters, routing, batch)))


@pytest.mark.slow
def test_gradients_of_adapters_follow_from_those_of_the_merged_weights():
    params, routing = tiny.build(MODEL)
    adapters = filled(lora.shapes(EVERY, params, LAYOUT.roles))
    state = TrainState(0, merged(params, adapters), None, routing)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(ROWS))
    options = {
        "model": VisionLanguage(MODEL),
        "trainable": set(params_lib.flatten(params)),
        "accumulation": 1,
    }
    whole = params_lib.flatten(jax.jit(lambda s, b: gradients(s, b, **options)[0])(state, batch))
    found, factors = adapted_gradients(), params_lib.flatten(adapters)
    assert found.keys() == {*factors, "adapter/newline"}
    # da = s dW b^T and db = s a^T dW, with the axes of three kinds of weights written out.
    for path, da, db in (
        ("language/moe_layers/attention/query", "ldnh,lrnh->ldr", "ldr,ldnh->lrnh"),
        ("language/moe_layers/attention/output", "lnhd,lrd->lnhr", "lnhr,lnhd->lrd"),
        ("language/moe_layers/moe/w_in", "ledxf,lexrf->lexdr", "lexdr,ledxf->lexrf"),
        ("language/moe_layers/moe/shared/w_out", "lfd,lrd->lfr", "lfr,lfd->lrd"),
        ("encoder/blocks/attention/qkv", "ldxnh,lrxnh->ldr", "ldr,ldxnh->lrxnh"),
    ):
        a, b = factors[f"{path}/a"], factors[f"{path}/b"]
        for name, expected in (
            ("a", EVERY.scale * np.einsum(da, whole[path], b)),
            ("b", EVERY.scale * np.einsum(db, a, whole[path])),
        ):
            error = np.linalg.norm(found[f"{path}/{name}"] - expected)
            assert error <= 1e-5 * np.linalg.norm(expected), (path, name)
            assert np.linalg.norm(expected) > 0


@pytest.mark.slow
def test_gradients_of_adapters_are_finite_differences_of_the_loss():
    params, routing = tiny.build(MODEL)
    adapters = filled(lora.shapes(EVERY, params, LAYOUT.roles))
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(ROWS))

    @jax.jit
    def loss(adapters: Any) -> jax.Array:
        state = TrainState(0, merged(params, adapters), None, routing)
        metrics = gradients(state, batch, model=VisionLanguage(MODEL), trainable=set(), accumulation=1)[1]
        return metrics["loss"] + metrics["auxiliary_loss"]

    flat, grads = params_lib.flatten(adapters), adapted_gradients()
    norm = np.sqrt(sum(np.sum(grads[path] ** 2) for path in flat))
    # Along the gradient, so little that no token changes its experts.
    losses = [
        float(loss(params_lib.unflatten({p: x + sign * STEP * grads[p] / norm for p, x in flat.items()})))
        for sign in (1.0, -1.0)
    ]
    np.testing.assert_allclose((losses[0] - losses[1]) / (2 * STEP), norm, rtol=0.01)


@pytest.mark.slow
def test_gradients_are_the_same_in_micro_batches_on_a_mesh():
    found, expected = adapted_gradients(MESHES["fsdp2-expert2-tensor2"], 2), adapted_gradients()
    assert found.keys() == expected.keys()
    # As in test_step: all leaves together 1e-5, single ones three times that.
    norm = {p: np.linalg.norm(g) for p, g in expected.items()}
    error = {p: np.linalg.norm(g - found[p]) for p, g in expected.items()}
    assert np.hypot.reduce(list(error.values())) <= 1e-5 * np.hypot.reduce(list(norm.values()))
    assert not {p: (error[p], norm[p]) for p in norm if error[p] > 3e-5 * norm[p]}


def test_adapters_lie_on_the_mesh_as_their_weights_do():
    layout = tiny.layout_of(MODEL, MESHES["fsdp2-expert2-tensor2"], devices=8)
    found = params_lib.flatten(lora.shapes(EVERY, layout.params, layout.roles))
    # w_in is [layers, experts, embed, gate or up, mlp].
    path = "language/moe_layers/moe/w_in"
    assert tuple(found[f"{path}/a"].sharding.spec) == (None, "expert", None, "fsdp", None)
    assert tuple(found[f"{path}/b"].sharding.spec) == (None, "expert", None, None, "tensor")
    path = "language/moe_layers/attention/output"
    assert tuple(found[f"{path}/a"].sharding.spec) == (None, "tensor", None, None)
    assert tuple(found[f"{path}/b"].sharding.spec) == (None, None, "fsdp")


STAGES = (
    Stage(
        "first",
        steps=4,
        batch_size=8,
        trainable=(),
        lora=LoraConfig(rank=2, alpha=4.0, targets=("attention", "routed")),
        optimizer=OptimizerConfig(learning_rate=0.02),
    ),
    Stage(
        "second",
        steps=3,
        batch_size=8,
        trainable=("adapter/newline",),
        lora=LoraConfig(rank=2, alpha=4.0, targets=("language/.*/shared/w_in", "encoder/blocks/.*")),
        optimizer=OptimizerConfig(learning_rate=0.02),
    ),
)


class Crash(RuntimeError):
    """Stands for whatever may end a process."""


class Batches:
    """A stream of four batches again and again, which may fail before one of them."""

    skipped: dict[str, int] = {}

    def __init__(self, fail_at: int | None):
        self.position, self.fail_at = 0, fail_at

    def __next__(self) -> Batch:
        if self.position == self.fail_at:
            raise Crash
        self.position += 1
        return tiny.varied_batch(8, seed=self.position % 4)

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        pass


def train(workdir: Path, stages=STAGES, *, fail_at: tuple[str, int] = ("", 0)) -> TrainState:
    """Runs the stages from the parameters of ``tiny``, or until before a batch of the named stage."""
    return tiny.train(
        LAYOUT,
        stages,
        lambda stage: Batches(fail_at[1] if fail_at[0] == stage.name else None),
        begin=lambda: Variables(*jax.tree.map(jnp.copy, tiny.build(MODEL))),
        workdir=workdir,
        config=LoopConfig(checkpoint_every=2, keep_checkpoints=9, log_every=1),
        seed=3,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, TrainState]:
    workdir = tmp_path_factory.mktemp("lora")
    return workdir, train(workdir)


def restored(workdir: Path, scratch: Path, step: int, stages=STAGES) -> tuple[TrainState, Position]:
    """What is in the checkpoint of a step."""
    shutil.copytree(workdir / "checkpoints" / str(step), scratch / str(step) / str(step))
    checkpointer = Checkpointer(scratch / str(step))
    try:
        found = saved.restore(checkpointer, LAYOUT, stages)
    finally:
        checkpointer.close()
    assert found is not None
    return found


def test_a_stage_moves_adapters_and_leaves_the_weights_bit_identical(run, tmp_path):
    state, position = restored(run[0], tmp_path, 2)
    assert (position.stage, position.step) == (0, 2)
    params, routing = tiny.build(MODEL)
    assert changed(params, state.params) == set()
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state.adapters))
    assert_moved_by_the_rate(routing["language"]["bias"], state.routing["language"]["bias"], steps=2)


@pytest.mark.slow
def test_a_stage_begins_with_the_merged_weights_of_the_one_before(run, tmp_path):
    state, position = restored(run[0], tmp_path, 4)
    assert (position.stage, position.step) == (1, 0)
    before, _ = tiny.build(MODEL)
    assert changed(before, state.params) == set(lora.select(STAGES[0].lora, before, LAYOUT.roles))
    assert_equal(state.params, train(tmp_path / "alone", STAGES[:1]).params)
    later, _ = restored(run[0], tmp_path, 6)
    assert changed(state.params, later.params) == {"adapter/newline"}


def test_a_finished_run_keeps_its_adapters_and_gives_merged_weights(run, tmp_path):
    _, result = run
    last, position = restored(run[0], tmp_path, 7)
    assert (position.stage, position.step) == (1, 3) and result.adapters == {}
    config = STAGES[1].lora
    expected = jax.jit(functools.partial(merged, scale=config.scale))(last.params, last.adapters)
    for path, leaf in params_lib.flatten(expected).items():
        np.testing.assert_allclose(params_lib.flatten(result.params)[path], leaf, rtol=1e-6, atol=1e-7)
    assert changed(last.params, result.params) == set(lora.select(config, last.params, LAYOUT.roles))
    assert_equal(train(run[0]).params, result.params)


def test_frozen_weights_have_no_optimiser_state(run, tmp_path):
    state, _ = restored(run[0], tmp_path, 6)
    trained = params_lib.count(state.adapters) + params_lib.flatten(state.params)["adapter/newline"].size
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * trained


@pytest.mark.slow
def test_a_run_interrupted_in_both_stages_ends_with_the_same_bits(run, tmp_path):
    for name, position in (("first", 3), ("second", 2)):
        with pytest.raises(Crash):
            train(tmp_path / "run", fail_at=(name, position))
    assert_equal(train(tmp_path / "run").params, run[1].params)
    last, _ = restored(tmp_path / "run", tmp_path / "a", 7)
    whole, _ = restored(run[0], tmp_path / "b", 7)
    for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def stage(*targets: str, trainable: tuple[str, ...] = ()) -> Stage:
    return Stage("sft", steps=1, trainable=trainable, lora=LoraConfig(rank=2, targets=targets))


def test_the_table_of_what_trains_counts_adapters():
    table = {row[0]: row[1:] for row in trainable_table(stage("routed"), LAYOUT.params, LAYOUT.roles)}
    frozen = Stage("sft", steps=1, trainable=())
    plain = {row[0]: row[1:] for row in trainable_table(frozen, LAYOUT.params, LAYOUT.roles)}
    # Two layers, four experts: w_in [D=16, 2, F=8] gives 2 * (16 r + r 8), w_out [F, D] gives 8 r + r 16.
    adapters = 2 * 4 * (2 * (16 + 8) * 2 + (8 + 16) * 2)
    assert table.pop("language/moe_layers") == (plain.pop("language/moe_layers")[0] + adapters, adapters)
    assert table == plain


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            stage("atention"),
            "config.stages.sft.lora.targets: pattern 'atention' matches no parameter; top-level names: "
            "adapter, encoder, language (names for patterns: attention, dense, shared, routed, vision, ",
        ),
        (stage("language/("), r"config.stages.sft.lora.targets: pattern 'language/(' is not a regular expr"),
        (
            stage("language/embedding"),
            "config.stages.sft.lora.targets: pattern 'language/embedding' matches no weight matrix, only "
            "language/embedding; embedding, head, router, norms and biases take no adapter",
        ),
        (
            stage("attention", trainable=("language/.*",)),
            "config.stages.sft.lora.targets: language/dense_layers/attention/kv_down/kernel trains itself, "
            "by config.stages.sft.trainable=('language/.*',); trainable=() trains adapters alone",
        ),
    ],
)
def test_targets_that_make_no_sense_are_refused_in_one_line(stage, message):
    with pytest.raises(ValueError) as error:
        adapter_shapes(stage, LAYOUT.params, LAYOUT.roles)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}])
def test_options_without_a_meaning_are_refused(options):
    with pytest.raises(ValueError):
        LoraConfig(**options)
