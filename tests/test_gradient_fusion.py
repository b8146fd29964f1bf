"""Gradient fusion: ways of making one gradient of several, and the step that takes one backward pass each."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_joint import IMAGE, KINDS, TEXT, joint, random_batch

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Variables, plan_layout, put_batch
from vl_jax.moe.stacks import init_state
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.together import Part, Together
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients
from vl_jax.train.updates import groups as groups_lib
from vl_jax.train.updates.fusing import Facts
from vl_jax.train.updates.gradnorm import GradNorm, stepped
from vl_jax.train.updates.mmpareto import MMPareto, balanced, nearest
from vl_jax.train.updates.ogm_ge import OGMGE, slowed
from vl_jax.train.updates.pcgrad import PCGrad, projected
from vl_jax.train.updates.plain_adam import clipped_plain_adam
from vl_jax.train.updates.reweighted import Reweighted

VECTORS = st.lists(st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5), min_size=2, max_size=4).map(
    np.asarray
)


def gram_of(vectors: np.ndarray) -> jax.Array:
    return jnp.asarray(vectors @ vectors.T, jnp.float32)


def facts(vectors: np.ndarray, **changes) -> Facts:
    names = tuple("abcd"[: len(vectors)])
    fields = {
        "names": names,
        "grams": {"a": gram_of(vectors)},
        "losses": jnp.ones(len(vectors)),
        "scores": {},
        "key": jax.random.key(0),
        **changes,
    }
    return Facts(**fields)


# PCGrad.


quick = jax.jit(projected)
few = settings(max_examples=30)


def by_hand(vectors: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the article, on the vectors themselves."""
    result = vectors.astype(np.float64).copy()
    for i, turns in enumerate(order):
        for j in turns:
            product = result[i] @ vectors[j]
            if j != i and product < 0:
                result[i] -= product / (vectors[j] @ vectors[j]) * vectors[j]
    return result


@few
@given(VECTORS, st.randoms(use_true_random=False))
def test_pcgrad_is_the_published_algorithm(vectors, random):
    vectors = np.round(vectors, 2)
    order = np.asarray([random.sample(range(len(vectors)), len(vectors)) for _ in vectors])
    weights = np.asarray(quick(gram_of(vectors), jnp.asarray(order)))
    if min(np.linalg.norm(vectors, axis=1)) > 0.1:
        np.testing.assert_allclose(weights @ vectors, by_hand(vectors, order), atol=2e-3)


@few
@given(VECTORS)
def test_pcgrad_leaves_no_conflict_between_two(vectors):
    one, other = vectors[:2]
    rows = np.asarray(quick(gram_of(vectors[:2]), jnp.asarray([[0, 1], [1, 0]]))) @ vectors[:2]
    scale = 1e-4 * (1 + np.linalg.norm(one)) * (1 + np.linalg.norm(other))
    assert rows[0] @ other >= -scale and rows[1] @ one >= -scale
    assert (rows.sum(axis=0) @ vectors[:2].T >= -2 * scale).all()


def test_pcgrad_by_hand_and_without_conflict_it_changes_nothing():
    # (1, 0) and (-1, 1): the first loses -1/2 of the second, (1/2, 1/2); the second its first part, (0, 1).
    order = jnp.asarray([[0, 1], [1, 0]])
    rows = projected(gram_of(np.asarray([[1.0, 0], [-1, 1]])), order)
    np.testing.assert_allclose(rows, [[1, 0.5], [1, 1]], atol=1e-6)
    np.testing.assert_array_equal(projected(gram_of(np.asarray([[1.0, 0], [1, 1]])), order), np.eye(2))


@few
@given(VECTORS, st.randoms(use_true_random=False))
def test_pcgrad_in_a_given_order_does_not_depend_on_how_groups_are_numbered(vectors, random):
    count = len(vectors)
    order = np.asarray([random.sample(range(count), count) for _ in range(count)])
    rename = np.asarray(random.sample(range(count), count))  # new number of each
    other, turns = np.empty_like(vectors), np.empty_like(order)
    other[rename], turns[rename] = vectors, rename[order]
    first = quick(gram_of(vectors), jnp.asarray(order))
    second = quick(gram_of(other), jnp.asarray(turns))
    if min(np.linalg.norm(vectors, axis=1)) > 0.1:
        np.testing.assert_allclose(second[rename][:, rename], first, rtol=1e-3, atol=1e-3)


# MMPareto.


@few
@given(VECTORS)
def test_the_nearest_point_is_that_of_a_search(vectors):
    one, other = vectors[:2]
    shares = np.linspace(0, 1, 1001)
    lengths = np.linalg.norm(shares[:, None] * one + (1 - shares[:, None]) * other, axis=1)
    share = float(nearest(gram_of(vectors[:2])))
    found = np.linalg.norm(share * one + (1 - share) * other)
    assert 0 <= share <= 1 and found <= lengths.min() + 1e-3 * (1 + lengths.max())


def test_mmpareto_by_hand():
    # In agreement: the plain sum, times gamma.
    weights = balanced(gram_of(np.asarray([[1.0, 0], [1, 1]])), 1.5)
    np.testing.assert_allclose(weights, [1.5, 1.5], rtol=1e-6)
    # Against one another: (2, 0) and (-1, 1) have their nearest mean at 0.4, 2 * (0.2, 0.6), length 1.265;
    # the plain sum (1, 1) is longer by 1.118.
    weights = np.asarray(balanced(gram_of(np.asarray([[2.0, 0], [-1, 1]])), 1.0))
    np.testing.assert_allclose(weights, 2 * 1.118034 * np.asarray([0.4, 0.6]), rtol=1e-5)


@few
@given(VECTORS)
def test_mmpareto_serves_both_losses_and_is_as_long_as_the_sum(vectors):
    pair = vectors[:2]
    weights = np.asarray(balanced(gram_of(pair), 1.0))
    fused, scale = weights @ pair, 1e-3 * (1 + np.abs(pair).max()) ** 2
    stretch = max(1.0, np.abs(weights).max())
    if np.linalg.norm(pair, axis=1).min() > 0.1:
        assert (pair @ fused >= -scale * stretch).all()
        assert np.linalg.norm(fused) >= np.linalg.norm(pair.sum(axis=0)) * 0.999 - scale


def test_mmpareto_weighs_the_own_group_against_all_others_in_its_module():
    vectors = np.asarray([[-1.0, 1, 0], [1.0, 0, 0], [1, 0, 0]])  # own "a"; "b" and "c" are joint
    found, _ = MMPareto(gamma=1.0)(facts(vectors, grams={"a": gram_of(vectors), "head": jnp.eye(3)}), {})
    single, joint_ = found.by_module["a"][0], found.by_module["a"][1]
    np.testing.assert_allclose([joint_, single], 2 * 1.118034 * np.asarray([0.4, 0.6]), rtol=1e-5)
    assert found.by_module["a"][1] == found.by_module["a"][2]
    np.testing.assert_array_equal(found.by_module["head"], np.ones(3))


# OGM-GE and GradNorm.


def test_ogm_ge_by_hand():
    # Scores 0.6 and 0.3: the first is ahead by 2, 1 - tanh(0.5 * 2) = 0.2384; the second stays.
    np.testing.assert_allclose(slowed(jnp.asarray([0.6, 0.3]), 0.5), [0.238406, 1.0], rtol=1e-5)
    # Of three, each is held against the mean of the others: 0.6 / 0.3.
    np.testing.assert_allclose(slowed(jnp.asarray([0.6, 0.2, 0.4]), 0.5)[:2], [0.238406, 1.0], rtol=1e-5)


def test_ogm_ge_slows_modules_whatever_the_loss_and_asks_for_scores():
    vectors = np.eye(3)
    given_ = facts(
        vectors,
        grams=dict.fromkeys(("a", "b", "head"), gram_of(vectors)),
        scores={"a": jnp.float32(0.6), "b": jnp.float32(0.3)},
    )
    found, _ = OGMGE()(given_, {})
    np.testing.assert_allclose(found.by_module["a"], [0.238406] * 3, rtol=1e-5)
    np.testing.assert_array_equal(found.by_module["head"], np.ones(3))
    assert found.noise.keys() == {"a", "b"} and not OGMGE(noise=0.0)(given_, {})[0].noise
    with pytest.raises(ValueError, match="head of classes each, which say 'probability': b"):
        OGMGE()(dataclasses.replace(given_, scores={"a": jnp.float32(1)}), {})
    with pytest.raises(ValueError, match="named as towers are: groups are a, b, c; what trains is image"):
        OGMGE()(facts(vectors, grams={"image": gram_of(vectors)}), {})


def test_gradnorm_by_hand():
    # Norms 3 and 1, mean 2; both losses have fallen alike, so both wanted 1. Slopes: +3/2 and -1/2.
    # GroupWeights 1 - 0.15 and 1 + 0.05, divided by their mean 0.95.
    found = stepped(jnp.ones(2), jnp.asarray([3.0, 1.0]), jnp.asarray([0.5, 0.5]), 1.5, 0.1)
    np.testing.assert_allclose(found, np.asarray([0.85, 1.05]) / 0.95, rtol=1e-5)


def test_gradnorm_makes_norms_alike_and_pulls_what_is_behind():
    norms, step = jnp.asarray([4.0, 1.0, 2.0]), jax.jit(stepped, static_argnums=(3, 4))
    for alpha, fallen in itertools.product((0.0, 1.0), ([1.0, 1.0, 1.0], [0.4, 0.4, 0.8])):
        weights = jnp.ones(3)
        for _ in range(1000):
            weights = step(weights, norms, jnp.asarray(fallen), alpha, 0.005)
        wanted = (np.asarray(fallen) / np.mean(fallen)) ** alpha
        found = np.asarray(weights * norms)
        np.testing.assert_allclose(found / found.mean(), wanted / wanted.mean(), atol=0.05)
        np.testing.assert_allclose(np.mean(weights), 1.0, rtol=1e-5)


def test_gradnorm_remembers_the_first_losses():
    way, vectors = GradNorm(rate=0.1), np.diag([3.0, 1.0])
    state = way.init(("a", "b"))
    found, state = way(facts(vectors, losses=jnp.asarray([2.0, 4.0])), state)
    np.testing.assert_array_equal(state["first"], [2.0, 4.0])
    np.testing.assert_allclose(found.by_module["a"], np.asarray([0.85, 1.05]) / 0.95, rtol=1e-5)
    _, state = way(facts(vectors, losses=jnp.asarray([1.0, 1.0])), state)
    np.testing.assert_array_equal(state["first"], [2.0, 4.0])
    with pytest.raises(ValueError, match="'text' does not train; a do"):
        GradNorm(modules=("text",))(facts(vectors), state)


# Adam.


def adam_runs(factor: float, how: str) -> np.ndarray:
    """Steps of two parameters under Adam, the gradient of the first times a factor."""
    optimizer = {
        "gradient": optax.scale_by_adam(0.9, 0.95),
        "update": clipped_plain_adam(1e9, (0.9, 0.95), 1e-8),
    }[how]
    random, params = np.random.default_rng(0), jnp.zeros(2)
    state, found, step = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(40):
        plain = jnp.asarray(random.normal(1.0, 0.5, 2), jnp.float32)
        extra = {"plain": plain} if how == "update" else {}
        with jax.numpy_dtype_promotion("standard"):
            update, state = step(plain * jnp.asarray([factor, 1.0]), state, params, **extra)
        found.append(update)
    return np.asarray(found)


def test_adam_cancels_a_factor_on_the_gradient_and_not_one_on_the_update():
    plain = adam_runs(1.0, "gradient")
    np.testing.assert_allclose(adam_runs(0.1, "gradient"), plain, rtol=1e-4)
    np.testing.assert_allclose(adam_runs(1.0, "update"), plain, rtol=1e-5)
    np.testing.assert_allclose(adam_runs(0.1, "update"), plain * np.asarray([0.1, 1.0]), rtol=1e-4)


def test_the_limit_of_the_norm_is_that_of_the_plain_gradient():
    optimizer = clipped_plain_adam(1.0, (0.9, 0.95), 1e-8)
    plain = {"w": jnp.asarray([3.0, 4.0])}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update({"w": jnp.asarray([6.0, 0.0])}, optimizer.init(plain), plain=plain)
    np.testing.assert_allclose(state.mu["w"], [0.1 * 6 / 5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(state.nu["w"], 0.05 * np.asarray([0.6, 0.8]) ** 2, rtol=1e-5)


# The step.


OF_IMAGE = dataclasses.replace(KINDS, name="of_image")
OF_TEXT = dataclasses.replace(KINDS, name="of_text", stream="text")
FUSED = dataclasses.replace(KINDS, stream="fused")
THREE = Heads(("kind", "of_image", "of_text"), modalities=("joint", "image", "text"))
MODEL = joint(heads=(FUSED, OF_IMAGE, OF_TEXT), fusion=GatedStreams())
DENSE = joint(
    towers=(
        Tower("image", dataclasses.replace(IMAGE, moe=None, sparse_layers=())),
        Tower("text", TEXT, "tokens"),
    ),
    heads=(FUSED, OF_IMAGE, OF_TEXT),
    fusion=GatedStreams(),
)


def batch_of(config: JointConfig):
    batch = random_batch(config)
    of = batch.labels["kind"]
    return dataclasses.replace(batch, labels={head.name: of for head in config.heads})


@dataclasses.dataclass(frozen=True)
class Made:
    """A program with the state it begins with, at random weights."""

    program: Program
    state: TrainState
    batch: object

    @classmethod
    def of(cls, stage: Stage, config: JointConfig = DENSE, mesh: MeshConfig | None = None) -> Made:
        mesh = mesh or MeshConfig(data=1)
        devices = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
        found = make_mesh(mesh, devices=jax.devices()[:devices])
        layout = plan_layout(config, config.smallest_batch(devices), found)
        random = np.random.default_rng(1)

        def draw(path, leaf):
            value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
            return jax.device_put(value, leaf.sharding)

        params, program = params_lib.map_paths(draw, layout.params), Program.of(layout, stage)
        routing = jax.device_put(init_state(config.stacks), layout.replicated)
        state = program.begin(Variables(params, routing, {}), jax.random.key(0))
        with sharding.use_mesh(layout.mesh, layout.rules):
            batch = put_batch(batch_of(config), layout)
        return cls(program, state, batch)

    def gradients(self, *, grouped: bool, accumulation: int = 1):
        stage, layout = self.program.stage, self.program.layout

        def compute(state, batch):
            grads, metrics, _ = gradients(
                state,
                batch,
                model=layout.model,
                trainable=self.program.trainable,
                lora_scale=stage.lora_scale,
                roles=layout.roles,
                accumulation=accumulation,
                objective=stage.objective,
                grouped=grouped,
            )
            return grads, metrics

        with sharding.use_mesh(layout.mesh, layout.rules):
            return jax.jit(compute).lower(self.state, self.batch).compile()

    def run(self, steps: int = 1, rate: float = 0.1):
        layout, state, metrics = self.program.layout, self.state, {}
        step = jax.jit(self.program.step_of(0))
        with sharding.use_mesh(layout.mesh, layout.rules):
            for _ in range(steps):
                state, metrics = step(state, self.batch, np.float32(rate), np.float32(np.inf))
        return jax.device_get(state), jax.device_get(metrics)


def stage(way=None, **changes) -> Stage:
    return Stage("s", 1, batch_size=16, **{"objective": THREE, "gradients": way, **changes})


def assert_close(found, expected, **bars) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **bars), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_groups_add_up_to_the_plain_gradient(accumulation):
    made = Made.of(stage(), MODEL)
    arguments = made.state, made.batch
    plain, logged = made.gradients(grouped=False, accumulation=accumulation)(*arguments)
    found, same = made.gradients(grouped=True, accumulation=accumulation)(*arguments)
    assert found.keys() == {"joint", "image", "text"}
    scale = float(optax.tree.norm(plain))
    assert_close(groups_lib.total(found), plain, rtol=1e-6, atol=1e-6 * scale)
    assert_close(same, logged, rtol=1e-6)
    # A loss of one modality asks nothing of the other's encoder.
    for group, module in (("image", "text"), ("text", "image")):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(found[group][module]))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(found[group][group]))


@pytest.mark.slow
def test_a_group_costs_at_most_a_backward_pass():
    made = Made.of(stage(), DENSE)
    plain, found = (made.gradients(grouped=g).cost_analysis()["flops"] for g in (False, True))
    layout = made.program.layout
    forward = jax.jit(lambda p, b: layout.model.apply({"params": p}, b, {}).predictions)
    forward = forward.lower(made.state.params, made.batch).compile().cost_analysis()["flops"]
    backward = plain - forward
    assert found <= 1.02 * (forward + 3 * backward), (forward, plain, found)


@pytest.mark.slow
def test_weights_of_one_are_the_plain_step():
    expected, logged = Made.of(stage()).run(3)
    adam = expected.optimizer[1]
    for way, place in ((Reweighted(at="gradient"), 1), (Reweighted(at="update"), 0)):
        found, metrics = Made.of(stage(way)).run(3)
        # Not the parameters: where a gradient is nothing but rounding, Adam makes it as large as any other.
        assert_close(found.optimizer[place].mu, adam.mu, rtol=1e-4, atol=1e-6)
        assert_close(found.optimizer[place].nu, adam.nu, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"], logged["loss"], rtol=1e-5)


@pytest.mark.slow
def test_adam_cancels_a_weight_at_the_gradient_and_keeps_it_at_the_update():
    """What the text head learns, of whose group every gradient is a tenth; nothing else acts on it."""
    options = OptimizerConfig(weight_decay=0.0, clip_norm=1e6)
    weights = (("text", 0.1),)
    moved = {}
    for name, way in {
        "plain": None,
        "gradient": Reweighted(weights, at="gradient"),
        "update": Reweighted(weights, at="update"),
    }.items():
        made = Made.of(stage(way, optimizer=options))
        before = np.asarray(made.state.params["of_text"]["classes"]["kernel"])
        after, _ = made.run(1, rate=1e-3)
        moved[name] = np.asarray(after.params["of_text"]["classes"]["kernel"]) - before
    np.testing.assert_allclose(moved["gradient"], moved["plain"], rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(moved["update"], 0.1 * moved["plain"], rtol=1e-2, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", [OGMGE(), MMPareto()], ids=["ogm_ge", "mmpareto"])
def test_modules_are_weighed_by_what_their_modality_does(way):
    found, metrics = Made.of(stage(way)).run()
    assert np.isfinite(optax.tree.norm(found.params)) and not found.fusing
    name = "factor" if isinstance(way, OGMGE) else "joint_weight"
    assert {f"gradients/{module}/{name}" for module in ("image", "text")} <= metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize("way", [PCGrad(), GradNorm()], ids=["pcgrad", "gradnorm"])
def test_eight_devices_are_one_and_micro_batches_a_batch(way):
    expected, logged = Made.of(stage(way)).run(2, rate=1e-3)
    for found, metrics in (
        Made.of(stage(way), mesh=MeshConfig(data=4, fsdp=2)).run(2, rate=1e-3),
        Made.of(stage(way, accumulation=4)).run(2, rate=1e-3),
    ):
        # Adam's first steps are signs: where a gradient is nothing but rounding, the update is the rate.
        assert_close(found.optimizer[0].mu, expected.optimizer[0].mu, rtol=2e-3, atol=2e-5)
        assert_close(found.fusing, expected.fusing, rtol=1e-3)
        for name in ("gradients/joint/norm", "gradients/joint/image/cosine", "grad_norm", "loss"):
            np.testing.assert_allclose(metrics[name], logged[name], rtol=2e-3, atol=1e-4)
    assert np.isfinite(optax.tree.norm(expected.params))


@pytest.mark.slow
def test_adapters_and_frozen_parameters_are_fused_too():
    from vl_jax.train.lora import LoraConfig

    lora = LoraConfig(rank=2, targets=("image/.*qkv", "text/.*qkv"))
    heads = ("kind/.*", "of_image/.*", "of_text/.*")
    made = Made.of(stage(PCGrad(), lora=lora, trainable=heads))
    found, metrics = made.run(2, rate=1e-2)
    changed = {
        path
        for path, leaf in params_lib.flatten(found.params).items()
        if np.any(leaf != np.asarray(params_lib.flatten(made.state.params)[path]))
    }
    assert changed and {path.split("/")[0] for path in changed} <= {"kind", "of_image", "of_text"}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(found.adapters["text"]))
    assert metrics["gradients/text/norm"] > 0


def test_groups_are_what_an_objective_says():
    parts = Together((Part("pairs", ContrastivePairs()), Part("heads", THREE), Part("one", Heads(("kind",)))))
    assert groups_lib.groups_of(parts) == {
        "pairs/pairs/loss": "pairs",
        "heads/kind/loss": "joint",
        "heads/of_image/loss": "image",
        "heads/of_text/loss": "text",
        "one/kind/loss": "one",
    }
    assert groups_lib.groups_of(Heads(("kind", "of_text"))) == {
        "kind/loss": "kind",
        "of_text/loss": "of_text",
    }
    assert groups_lib.groups_of(NextToken()) == {"loss": "loss"}
    with pytest.raises(ValueError, match="expected one a head"):
        Heads(("kind",), modalities=("a", "b"))


def test_a_stage_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="gradients=PCGrad with the one group 'loss' of NextToken"):
        Stage("s", 1, gradients=PCGrad())
    with pytest.raises(ValueError, match="must be 'gradient', or the method 'adamw'"):
        stage(PCGrad(), optimizer=OptimizerConfig(method="muon"))
    assert stage(PCGrad(at="gradient"), optimizer=OptimizerConfig(method="muon"))
    with pytest.raises(ValueError, match="'sound' is no group; there are: joint, image, text"):
        stage(Reweighted((("sound", 2.0),)))


@pytest.mark.slow
def test_a_probe_learns_from_a_stream_and_leaves_it():
    of_text = dataclasses.replace(OF_TEXT, probe=True)
    config = dataclasses.replace(DENSE, heads=(FUSED, OF_IMAGE, of_text))
    made = Made.of(stage(), config)
    found, _ = made.gradients(grouped=True)(made.state, made.batch)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["text"]["text"]))
    assert np.any(found["text"]["of_text"]["classes"]["kernel"])
