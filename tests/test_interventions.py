"""Interventions in routing: what a study counts, and that a taken-away expert is not used."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import cli
from vl_jax.evaluate import interventions
from vl_jax.model import VisionLanguage
from vl_jax.moe import routing
from vl_jax.moe.routing import RoutingContext

E = 4


def routed(scheme: str, excluded, *, bias=None):
    """Experts chosen by two groups of five tokens."""
    state = {} if bias is None else {"bias": np.array(bias, np.float32)}
    if excluded is not None:
        state[routing.EXCLUDED] = np.asarray(excluded)
    return jax.device_get(_routed(tiny.config(scheme).moe, state))


@functools.partial(jax.jit, static_argnums=0)
def _routed(config: routing.MoEConfig, state):
    logits = np.random.default_rng(0).standard_normal((2, 5, E), np.float32)
    context = RoutingContext(valid=jnp.ones((2, 5), bool), modality=jnp.zeros((2, 5), jnp.int32))
    return routing.route(jnp.asarray(logits), context, state, config)[0]


@pytest.mark.parametrize("scheme", ["top_k", "top_k_softmax", "loss_free"])
def test_an_excluded_expert_is_replaced_by_the_next_best(scheme):
    bias = [9.0, 0.0, 0.0, 0.0] if scheme == "loss_free" else None  # as attractive as can be
    before = routed(scheme, None, bias=bias).experts
    after = routed(scheme, np.arange(E) == np.full((1, 1, 1), 0), bias=bias).experts
    assert np.any(before == 0) and not np.any(after == 0) and np.all(after < E)
    untouched = ~np.any(before == 0, axis=-1)
    np.testing.assert_array_equal(np.sort(before[untouched]), np.sort(after[untouched]))


def test_an_expert_may_be_taken_away_from_one_token_only():
    before = routed("top_k", None).experts
    mask = np.zeros((2, 5, E), bool)
    mask[1, 3, before[1, 3, 0]] = True
    after = np.array(routed("top_k", mask).experts)
    assert before[1, 3, 0] not in after[1, 3]
    after[1, 3] = before[1, 3]
    np.testing.assert_array_equal(after, before)


@pytest.fixture(scope="module")
def setting():
    config = tiny.config("loss_free")
    params, state = tiny.build(config)
    layout = tiny.layout_of(config)
    return config, layout, params, state


@pytest.mark.slow
def test_a_study_counts_what_the_model_does_and_takes_away(setting):
    config, layout, params, state = setting
    batches = [tiny.varied_batch(2), tiny.varied_batch(2)]
    found = interventions.study(layout, params, state, batches, stack="language", num_changes=5)
    losses_of = jax.jit(functools.partial(interventions.target_losses, model=VisionLanguage(config)))
    losses = [np.asarray(losses_of(params, state, batch)) for batch in batches]
    weights = [b.loss_weights for b in batches]
    total = sum(float(np.sum(np.asarray(v) * w)) for v, w in zip(losses, weights, strict=True))
    np.testing.assert_allclose(found.loss, total / sum(float(w.sum()) for w in weights), rtol=1e-5)
    valid = sum(int(np.count_nonzero(b.segment_ids)) for b in batches)
    assert found.load.shape == (2, 2, E) and np.all(found.load.sum(axis=(1, 2)) == valid * 2)
    # A token that chose two experts counts for the pair, and for each of them on the diagonal.
    np.testing.assert_allclose(np.diagonal(found.choices, axis1=1, axis2=2), found.load.sum(axis=1))
    assert np.all(found.router_entropy <= np.log(E) + 1e-6) and np.all(found.marginal_entropy <= np.log(E))
    assert np.all(found.modality_information >= -1e-9)
    # Of one shard every token uses one, of four shards with an expert each as many as it chose.
    np.testing.assert_allclose(found.fan_out[:, [0, 2]], [[1, 2]] * 2)
    assert np.all((found.fan_out[:, 1] > 1) & (found.fan_out[:, 1] < 2))
    assert found.knockout.shape == (2, E) and np.all(np.isfinite(found.knockout))
    assert len(found.changes) == 5
    gains = [c.rerouted_loss - c.loss for c in found.changes]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    for change in found.changes:
        batch = batches[change.batch]
        column = list(batch.target_index[change.row]).index(change.position)
        np.testing.assert_allclose(losses[change.batch][change.row, column], change.loss, rtol=1e-4)


@pytest.mark.slow
def test_an_expert_nobody_chooses_can_be_taken_away_without_harm(setting):
    config, layout, params, state = setting
    bias = np.zeros((2, E), np.float32)
    bias[:, 3] = -50.0
    routing_state = {"language": {"bias": jnp.asarray(bias)}}
    found = interventions.study(layout, params, routing_state, [tiny.varied_batch(2)], stack="language")
    assert np.all(found.load[:, :, 3] == 0)
    np.testing.assert_allclose(found.knockout[:, 3], found.loss, rtol=1e-6)
    assert np.any(np.abs(found.knockout[:, :3] - found.loss) > 1e-6)


@pytest.mark.slow
def test_the_page_of_a_run_is_written(tmp_path, capsys):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    file = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    run = tmp_path / "run"
    short = ("--config.stages.first.steps=1", "--config.stages.second.steps=1")
    assert cli.main(["train", f"--config={file}", f"--workdir={run}", *short]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", "routing", f"--workdir={run}", "--batches=1"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "routing.html")
    figures = json.loads((run / "routing.json").read_text())
    # The run kept the checkpoint at the end of its first stage, one step earlier.
    assert figures["churn"]["since_step"] == 1 and 0 <= figures["churn"]["share"][0] <= 1
    assert np.shape(figures["fan_out"]) == (1, 3) and figures["fan_out_shards"] == [1, 2, 4]
    assert np.shape(figures["knockout"]) == (1, E) and figures["step"] == 2 and figures["targets"] > 0
    page = (run / "routing.html").read_text(encoding="utf-8")
    assert "of 2 shards, those a token is sent to" in page and "changed since step 1" in page
    assert "Loss without one expert" in page and "<script" not in page
    assert cli.main(["inspect", "routing"]) == 2
    assert "needs --workdir" in capsys.readouterr().err


MANY = 8
TAKEN_AWAY = ("hash", "dselect_k", "modality_bias", "expert_choice")  # in ways of their own; others are slow
WHERE = RoutingContext(
    valid=jnp.ones((2, 8), bool),
    modality=jnp.arange(16, dtype=jnp.int32).reshape(2, 8) % 2,
    tokens=jnp.arange(16, dtype=jnp.int32).reshape(2, 8),
)


@functools.partial(jax.jit, static_argnums=0)
def _weights(config: routing.MoEConfig, state, excluded):
    """The assignment, and how much of each expert every token gets, [2 8 E]."""
    state = {**state, routing.EXCLUDED: excluded}
    columns = routing.scheme_of(config).columns(config)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, columns), np.float32))
    found = routing.route(logits, WHERE, state, config)[0]
    if isinstance(found, routing.TokenChoice):
        return found, jnp.sum(jax.nn.one_hot(found.experts, MANY) * found.gates[..., None], axis=2)
    if isinstance(found, routing.ExpertChoice):
        return found, jnp.einsum("GEC,GECT->GTE", found.gates, jax.nn.one_hot(found.tokens, 8))
    if isinstance(found, routing.Soft):
        return found, jnp.sum(found.combine, axis=-1)
    return found, jnp.broadcast_to(found.weights[:, None], (2, 8, MANY))


def weights_of(scheme: str, excluded):
    top_k = 1 if scheme == "switch" else 2
    options = (("slots", 2.0),) if scheme == "soft_moe" else ()
    config = routing.MoEConfig(scheme, num_experts=MANY, top_k=top_k, expert_dim=4, options=options)
    state = jax.tree.map(np.array, routing.init_state(config))
    if "bias" in state:  # the first expert is as attractive as can be
        state["bias"][..., 0] = 9.0
    return jax.device_get(_weights(config, state, excluded))


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=() if s in TAKEN_AWAY else pytest.mark.slow) for s in routing.SCHEMES]
)
def test_no_scheme_gives_a_token_anything_of_an_expert_that_is_taken_away(scheme):
    # For every token, unless all of them have to be denied the same ones.
    shape = (1, 1, MANY) if scheme == "smear" else (2, 8, MANY)
    before, weights = weights_of(scheme, np.zeros(shape, bool))
    for gone in ([0], [0, 3, 5], list(range(7))):
        found, after = weights_of(scheme, np.broadcast_to(np.isin(np.arange(MANY), gone), shape))
        assert not after[..., gone].any()
        if isinstance(found, routing.TokenChoice):
            assert not np.isin(found.experts, gone).any() and not found.gates[found.experts == MANY].any()
    first = np.argmax(weights, axis=-1)
    found, after = weights_of(scheme, np.broadcast_to(np.arange(MANY) == 0, shape))
    if weights[..., 0].any():
        assert not np.allclose(after, weights, atol=1e-6)  # no scheme answers as if nothing had happened
    if scheme == "smear":  # all tokens have the same
        return
    mask = first[..., None] == np.arange(MANY)
    found, after = weights_of(scheme, mask)
    assert not after[mask].any()
    varying = ("top_p", "remoe", "expert_threshold", "null_experts", "dselect_k")
    if isinstance(found, routing.TokenChoice) and scheme not in varying:  # others take the place
        np.testing.assert_array_equal((found.experts < MANY).sum(-1), (before.experts < MANY).sum(-1))
        assert all(len(set(row)) == len(row) for row in found.experts.reshape(16, -1).tolist())


def test_exclusions_that_cannot_be_are_refused_in_one_line():
    with pytest.raises(ValueError, match="scheme='smear': its tokens share one mean of experts"):
        weights_of("smear", np.zeros((2, 8, MANY), bool))
    with pytest.raises(
        ValueError,
        match=r"excluded experts are \(1, 1, 4\), expected \(1, 1, 8\), \(2, 1, 8\) or \(2, 8, 8\)",
    ):
        weights_of("top_k", np.zeros((1, 1, 4), bool))
