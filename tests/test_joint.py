"""Joint models: towers, fusion and heads by config, their objectives, and parts in one's own file."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch, Given
from vl_jax.encoders.adapter import used_tiles
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.fusion.streams import Stream, pool
from vl_jax.heads.classification import Classification
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import plan_layout, put_batch
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.stacks import init_state
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.objectives.together import Part, Together
from vl_jax.train.step import TrainState, gradients

EXPERTS = MoEConfig(
    scheme="loss_free", num_experts=4, top_k=2, expert_dim=8, balance=BalanceConfig(weight=0.01)
)
IMAGE = ViTConfig(
    image_size=16,
    patch_size=8,
    embed_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    moe=EXPERTS,
    sparse_layers=(1,),
)
TEXT = TextEncoderConfig(
    vocab_size=64,
    max_length=8,
    embed_dim=16,
    mlp_dim=32,
    num_layers=1,
    num_heads=2,
    causal=False,
    projection_dim=0,
    pooling="last",
)
KINDS = Classification(("red", "green", "blue"), name="kind", field="kind")
# The same grid behind convolutions, whose statistics move.
TRUNK = ResNetConfig(
    stem_dim=4, stage_dims=(6, 8), stage_blocks=(1, 2), block="basic", image_size=16, statistics="moving"
)
HYBRID = HybridConfig(
    trunk=TRUNK,
    patch_size=8,
    embed_dim=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    moe=EXPERTS,
    sparse_layers=(1,),
)
ROWS, T = 16, 6


def joint(**changes) -> JointConfig:
    fields = {
        "towers": (Tower("image", IMAGE), Tower("text", TEXT, "tokens")),
        "heads": (KINDS, Pairs(dim=8)),
        **changes,
    }
    return JointConfig(**fields)


def hybrid(**changes) -> JointConfig:
    trunk = dataclasses.replace(TRUNK, **changes)
    return joint(towers=(Tower("image", dataclasses.replace(HYBRID, trunk=trunk)),), heads=(KINDS,))


def random_batch(config: JointConfig, rows: int = ROWS) -> Batch:
    """Rows with a picture and a text each; some lack a label."""
    random = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), config.smallest_batch(1))
    length = random.integers(2, T + 1, rows)
    tokens = random.integers(1, 64, (rows, T)).astype(np.int32)
    here = np.arange(T) < length[:, None]
    ids = np.arange(rows, dtype=np.int32) // 2  # two texts a picture
    labels = {
        "kind": Given(random.integers(0, 3, rows).astype(np.int32), random.random(rows) < 0.7),
        "pairs": Given(ids, random.random(rows) < 0.9),
    }
    changes = {
        "tokens": tokens * here,
        "segment_ids": here.astype(np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
        "tiles": random.integers(0, 256, (rows, 1, 16, 16, 3)).astype(np.uint8),
        "visual_index": np.tile(np.arange(4, dtype=np.int32), (rows, 1)),
        "labels": labels,
    }
    return dataclasses.replace(batch, **changes)


@functools.cache
def results(
    config: JointConfig,
    objective,
    mesh: MeshConfig | None = None,
    *,
    accumulation: int = 1,
    trainable: str = ".*",
):
    """(gradients, metrics, counts of routing, collections before and after) of the batch, on the host."""
    mesh = mesh or MeshConfig(data=1)
    devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    layout = plan_layout(
        config, config.smallest_batch(devices), make_mesh(mesh, devices=jax.devices()[:devices])
    )
    random = np.random.default_rng(1)

    def draw(path, leaf):
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        value = 0.5 + np.abs(value) if path.endswith("variance") else value
        return jax.device_put(value, leaf.sharding)

    params, collections = params_lib.map_paths(draw, layout.params), {}
    if layout.collections:
        collections = params_lib.map_paths(draw, layout.collections)
    routing = jax.device_put(init_state(config.stacks), layout.replicated)
    options = {
        "model": layout.model,
        "trainable": params_lib.select(params, [trainable]),
        "accumulation": accumulation,
        "objective": objective,
    }

    def compute(params, collections, routing, batch):
        state = TrainState(jnp.zeros((), jnp.int32), params, None, routing, collections=collections)
        grads, metrics, sums = gradients(state, batch, **options)
        return grads, metrics, sums.stats, (collections, collections | sums.collections)

    with sharding.use_mesh(layout.mesh, layout.rules):
        batch = put_batch(random_batch(config), layout)
        return jax.device_get(jax.jit(compute)(params, collections, routing, batch))


def assert_same(found, expected) -> None:
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found[0], expected[0])
    jax.tree.map(np.testing.assert_array_equal, found[2]["image"].load, expected[2]["image"].load)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, found[3][1], expected[3][1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [Heads(("kind",)), ContrastivePairs(chunk=3)],
    ids=["heads", "contrastive"],
)
def test_eight_devices_are_one(objective):
    config = joint()
    assert_same(results(config, objective, MeshConfig(data=2, expert=4)), results(config, objective))


@pytest.mark.slow
def test_statistics_of_a_sharded_batch_are_those_of_the_whole():
    objective = Heads(("kind",))
    assert_same(results(hybrid(), objective, MeshConfig(data=2, expert=4)), results(hybrid(), objective))


@pytest.mark.slow
def test_micro_batches_are_one_batch_for_heads_and_refused_where_rows_act_on_one_another():
    config, objective = joint(), Heads(("kind",))
    assert_same(results(config, objective, accumulation=4), results(config, objective))
    assert ContrastivePairs().couples_rows and Together((Part("a", ContrastivePairs()),)).couples_rows


@pytest.mark.slow
@pytest.mark.parametrize("config", [joint(), hybrid()], ids=["vit", "hybrid"])
def test_remat_changes_nothing(config):
    other = dataclasses.replace(config, remat=True)
    assert_same(results(other, Heads(("kind",))), results(config, Heads(("kind",))))


def moved(config: JointConfig, **options) -> set[str]:
    """The running statistics that a step changes, were it by a bit."""
    before, after = (params_lib.flatten(tree) for tree in results(config, Heads(("kind",)), **options)[3])
    assert before.keys() == after.keys()
    return {path for path in before if np.any(before[path] != after[path])}


@pytest.mark.slow
def test_frozen_statistics_keep_their_bits_and_micro_batches_are_one_batch():
    config, objective = hybrid(statistics="frozen"), Heads(("kind",))
    assert not moved(config) and not moved(config, accumulation=4)
    assert_same(results(config, objective, accumulation=4), results(config, objective))


@pytest.mark.slow
def test_statistics_move_where_scale_and_bias_train_and_nowhere_else():
    everything = set(params_lib.flatten(results(hybrid(), Heads(("kind",)))[3][0]))
    assert moved(hybrid()) == everything
    first = "image/trunk/stem/.*"
    expected = {path for path in everything if "/stem/" in path}
    assert moved(hybrid(), trainable=first, accumulation=4) == expected
    # What stays is what the norm goes by: a head alone sees what it will see in an evaluation.
    alone = results(hybrid(), Heads(("kind",)), trainable="kind/.*")
    still = results(hybrid(statistics="frozen"), Heads(("kind",)))
    np.testing.assert_allclose(alone[1]["loss"], still[1]["loss"], rtol=1e-6)
    assert abs(still[1]["loss"] - results(hybrid(), Heads(("kind",)))[1]["loss"]) > 1e-3


@pytest.mark.slow
def test_several_objectives_are_logged_by_name_and_weighted():
    config = joint()
    both = Together((Part("classes", Heads(("kind",)), weight=0.5), Part("match", ContrastivePairs())))
    metrics = results(config, both)[1]
    alone = [results(config, o)[1] for o in (Heads(("kind",)), ContrastivePairs())]
    np.testing.assert_allclose(metrics["classes/kind/loss"], alone[0]["kind/loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["match/pairs/loss"], alone[1]["pairs/loss"], rtol=1e-5)
    np.testing.assert_allclose(
        metrics["loss"], 0.5 * alone[0]["kind/loss"] + alone[1]["pairs/loss"], rtol=1e-5
    )


def test_rows_without_a_label_count_for_nothing():
    prediction = jnp.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [9.0, 0.0, 0.0]])
    label = Given(jnp.array([0, 0, 2]), jnp.array([True, True, False]))
    loss, metrics = KINDS.sums(prediction, label)
    log_sum = np.log(np.exp(2) + 2)
    np.testing.assert_allclose(loss, (log_sum - 2) + log_sum, rtol=1e-6)
    assert metrics["accuracy"] == 1 and KINDS.decode(np.array(prediction[1])) == "green"


def test_an_objective_of_a_head_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"heads=\('label',\): no head 'label'; the model has: kind"):
        results(joint(), Heads())


def test_every_patch_of_every_picture_is_routed_once():
    counted = results(joint(), Heads(("kind",)))[2]["image"]
    np.testing.assert_array_equal(counted.tokens, [[0, ROWS * 4]])
    assert counted.load.sum() == ROWS * 4 * 2


@pytest.mark.slow
def test_a_text_looks_at_the_picture_through_the_gate():
    fusion = GatedStreams(reader="text", source="image")
    config = joint(fusion=fusion, heads=(dataclasses.replace(KINDS, stream="fused"),))
    grads = results(config, Heads(("kind",)))[0]
    assert np.abs(grads["image"]["stem"]["kernel"]).max() > 0
    with pytest.raises(ValueError, match=r"fusion.source='sound' is no tower; there are: image, text"):
        joint(fusion=GatedStreams(source="sound"))


def test_a_stream_is_pooled_over_the_tokens_that_are_there():
    tokens = jnp.arange(12.0).reshape(1, 3, 4)
    stream = Stream(tokens, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(pool(stream), [[2.0, 3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(
        used_tiles(jnp.array([[0, 5, -1], [-1, -1, -1]]), tiles=3, tile_tokens=4),
        [[True, True, False], [False, False, False]],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": ()}, "2 towers, 0 heads: expected at least one each"),
        ({"heads": (dataclasses.replace(KINDS, stream="sound"),)}, "'sound'"),
        ({"heads": (dataclasses.replace(KINDS, name="image"),)}, "name 'image' of a tower or head"),
        (
            {"towers": (Tower("text", TEXT, "tokens"), Tower("more", TEXT, "tokens"))},
            "two towers read tokens",
        ),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        joint(**changes)
