"""Domains: who is told one, which experts its tokens take, what draws the router, and what a page shows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.batch import Given
from vl_jax.data.config import DataConfig, open_sources
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.build import InDomainConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe import routing
from vl_jax.moe.assignment import weights_of
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.routing import EXCLUDED, TOWARDS, MoEConfig, RoutingContext
from vl_jax.moe.specialise.domains import Domain, DomainsConfig, with_domains
from vl_jax.moe.stacks import Stack, init_state, sown
from vl_jax.report import matrices

MOE = MoEConfig(
    num_experts=4,
    top_k=2,
    expert_dim=6,
    shared=SharedExpertsConfig(num=0),
    balance=BalanceConfig(weight=0.0),
)
STACK = Stack(MOE, (0, 2), (("a", "moe"), ("b", "moe")))
DOMAINS = DomainsConfig((Domain("roads", (0, 1)), Domain("bones", (2, 3))), others=(0, 3))
TOLD = Given(jnp.array([1, 0, 0]), jnp.array([True, True, False]))
ENCODER = ViTConfig(
    image_size=16,
    patch_size=8,
    embed_dim=8,
    mlp_dim=8,
    num_layers=1,
    num_heads=2,
    moe=MOE,
    sparse_layers=(0,),
)
MODEL = JointConfig((Tower("image", ENCODER),), (Classification(("a", "b")),), domains=DOMAINS)


def test_rows_may_take_the_experts_of_their_domain():
    state = with_domains({"bias": jnp.zeros((2, 4))}, TOLD, DOMAINS, STACK, groups=6)
    open_to = ~np.asarray(state[EXCLUDED])
    assert open_to.shape == (2, 6, 1, 4) and state.keys() == {"bias", EXCLUDED}
    rows = [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 1]]
    np.testing.assert_array_equal(open_to[0, :, 0], rows)  # two tiles a row
    np.testing.assert_array_equal(open_to[1], open_to[0])


def test_an_intervention_closes_experts_besides():
    knocked = jnp.array([True, False, False, False])[None, None, None].repeat(2, axis=0)
    state = with_domains({EXCLUDED: knocked}, TOLD, DOMAINS, STACK, groups=3)
    np.testing.assert_array_equal(state[EXCLUDED][0, 1, 0], [True, False, True, True])


def test_without_picked_experts_and_others_nothing_is_closed():
    plain = dataclasses.replace(DOMAINS, picked=False, others=())
    assert with_domains({}, TOLD, plain, STACK, groups=3) == {}
    others = dataclasses.replace(DOMAINS, picked=False)
    state = with_domains({}, TOLD, others, STACK, groups=3)
    np.testing.assert_array_equal(~state[EXCLUDED][0, :, 0], [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1]])
    unknown = with_domains({}, None, others, STACK, groups=3)
    np.testing.assert_array_equal(~unknown[EXCLUDED][0, :, 0], [[1, 0, 0, 1]] * 3)


def test_the_loss_that_draws_the_router_by_hand():
    logits = jnp.log(jnp.array([[[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.4, 0.4]], [[0.25] * 4, [0.25] * 4]]))
    context = RoutingContext(valid=jnp.array([[True, True], [True, False]]), modality=jnp.zeros((2, 2), int))
    towards = jnp.array([[[2.0, 2.0, 0.0, 0.0]], [[0.0] * 4]])  # [G 1 E]; nobody draws the second group
    losses = routing.route(logits, context, {TOWARDS: towards}, MOE)[1]
    expected = 2.0 * (-math.log(0.7) - math.log(0.2)) / 2 / 2  # mean over two tokens, then over two groups
    np.testing.assert_allclose(losses[TOWARDS], expected, rtol=1e-6)
    closed = jnp.array([True, True, False, False])[None, None]
    both = routing.route(logits, context, {TOWARDS: towards, EXCLUDED: closed}, MOE)
    np.testing.assert_allclose(both[1][TOWARDS], expected, rtol=1e-6)  # of the logits as they are
    assert set(np.asarray(both[0].experts)[:, 0].ravel()) == {2, 3}
    grads = jax.grad(lambda z: routing.route(z, context, {TOWARDS: towards}, MOE)[1][TOWARDS])(logits)
    assert np.all(grads[0, :, :2] < 0) and np.all(grads[0, :, 2:] > 0) and not np.any(grads[1])


def test_masks_of_another_shape_are_refused():
    context = RoutingContext(valid=jnp.ones((2, 3), bool), modality=jnp.zeros((2, 3), int))
    message = r"experts to be drawn to are \(3, 1, 4\), expected \(1, 1, 4\), \(2, 1, 4\) or \(2, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        routing.route(jnp.zeros((2, 3, 4)), context, {TOWARDS: jnp.zeros((3, 1, 4))}, MOE)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["top_k", "expert_choice", "soft_moe", "smear"])
def test_tokens_of_a_row_take_nothing_of_closed_experts_by_any_scheme(scheme):
    config = dataclasses.replace(MOE, scheme=scheme)
    logits = jax.random.normal(jax.random.key(0), (3, 5, 4))
    context = RoutingContext(valid=jnp.ones((3, 5), bool), modality=jnp.zeros((3, 5), int))
    of_layer = jax.tree.map(lambda a: a[0], with_domains({}, TOLD, DOMAINS, STACK, groups=3))
    assignment = routing.route(logits, context, {**routing.init_state(config), **of_layer}, config)[0]
    weights = weights_of(assignment, context.valid, 4)
    closed = np.broadcast_to(of_layer[EXCLUDED], weights.shape)
    assert not np.any(np.asarray(weights)[closed]) and np.any(np.asarray(weights)[~closed])


@pytest.mark.slow
def test_a_model_routes_the_rows_of_a_batch_by_their_domain():
    rows = 3
    random = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), MODEL.smallest_batch(1))
    assert batch.labels.keys() == {"label", "domain"}
    batch = dataclasses.replace(
        batch,
        tiles=random.integers(0, 256, (rows, 1, 16, 16, 3)).astype(np.uint8),
        visual_index=np.tile(np.arange(4, dtype=np.int32), (rows, 1)),
        labels={**batch.labels, "domain": TOLD},
    )
    model, state = MODEL.build(), init_state(MODEL.stacks)
    variables = model.init(jax.random.key(0), batch, state, method="initialize")
    output, kept = model.apply(variables, batch, state, mutable=["intermediates"])
    experts = np.asarray(sown(kept["intermediates"], MODEL.stacks["image"])[0].assignment.experts)
    assert [set(row.ravel()) for row in experts] == [{2, 3}, {0, 1}, {0, 3}]
    drawn = dataclasses.replace(MODEL, domains=dataclasses.replace(DOMAINS, weight=0.5)).build()
    losses = drawn.apply(variables, batch, state).routed["image"].losses
    assert (
        losses[TOWARDS].shape == (1,) and losses[TOWARDS] > 0 and TOWARDS not in output.routed["image"].losses
    )
    assert params_lib.count(variables["params"]) == params_lib.count(
        drawn.init(jax.random.key(0), batch, state, method="initialize")["params"]
    )


def write(folder: Path, name: str, label: str) -> RecordsConfig:
    PilImage.new("RGB", (8, 8)).save(folder / f"{name}.png")
    records = [{"id": name, "image": f"{name}.png", "label": label}]
    (folder / f"{name}.json").write_text(json.dumps(records))
    return RecordsConfig(name, f"{name}.json", image="image", labels=("label",))


def test_samples_of_a_source_have_its_domain_among_their_labels(tmp_path):
    x, y, z = write(tmp_path, "x", "crack"), write(tmp_path, "y", "healthy"), write(tmp_path, "z", "hat")
    sources = InDomainConfig("x", "roads", x), InDomainConfig("y", "bones", y), z
    data = DataConfig(root=str(tmp_path), sources=sources)
    assert schema.from_json(schema.to_json(data), DataConfig) == data
    found = {name: source[0].labels for name, source in open_sources(data, None)[0].items()}
    assert found == {
        "x": {"label": "crack", "domain": "roads"},
        "y": {"label": "healthy", "domain": "bones"},
        "z": {"label": "hat"},
    }
    assert [DOMAINS.read(Sample("s", (), labels=labels)) for labels in found.values()] == [0, 1, None]
    head = Classification(("crack", "hole"), domain="roads")
    assert [head.read(Sample("s", (), labels=labels)) for labels in found.values()] == [0, None, None]
    with pytest.raises(BadSample, match="domain 'sea' is none of roads, bones"):
        DOMAINS.read(Sample("s", (), labels={"domain": "sea"}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DomainsConfig(()), "domains are named \\[\\]: there must be at least one"),
        (lambda: DomainsConfig((Domain("a", ()),)), "domain 'a' has experts=\\(\\)"),
        (lambda: dataclasses.replace(DOMAINS, weight=-1.0), "weight=-1.0 of the domains' loss must be >= 0"),
        (
            lambda: dataclasses.replace(MODEL, domains=DomainsConfig((Domain("a", (4,)),))),
            "domain 'a': 4 is no expert of image; expected 0 to 3",
        ),
        (
            lambda: dataclasses.replace(
                MODEL, towers=(Tower("image", dataclasses.replace(ENCODER, moe=None, sparse_layers=())),)
            ),
            "domains need experts: no encoder of the model has sparse layers",
        ),
        (
            lambda: dataclasses.replace(MODEL, heads=(Classification(("a", "b"), name="domain"),)),
            "name 'domain' of a tower or head",
        ),
        (
            lambda: InDomainConfig("x", "", RecordsConfig("x", "x.json", image="image")),
            "domain of source 'x' is empty",
        ),
    ],
)
def test_what_makes_no_sense_is_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_of_one_row_are_put_together_over_sources():
    def result(domain: str, values: list[float]) -> dict:
        one = {"title": "Experts, by domain", "rows": [domain], "columns": ["0", "1"], "values": [values]}
        two = {"title": "Confusion", "rows": ["a", "b"], "columns": ["a", "b"], "values": [[1, 0], [0, 1]]}
        return {"matrices": [{**m, "row_name": "domain", "column_name": "expert"} for m in (two, one)]}

    (found,) = matrices.joined([result("roads", [1.0, 0.0]), {}, result("bones", [0.2, 0.8])])
    assert found["rows"] == ["roads", "bones"] and found["values"] == [[1.0, 0.0], [0.2, 0.8]]
    assert "Experts, by domain" not in matrices.cards(result("roads", [1.0, 0.0])["matrices"])
    assert matrices.joined([result("roads", [1.0, 0.0])]) == []
