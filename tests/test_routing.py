"""Routing: naming a scheme, losses, statistics, and the schemes of published models by hand-worked values."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.batch import TEXT, VISION
from vl_jax.config import view
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import balance, losses, routing
from vl_jax.moe.config import (
    BalanceConfig,
    CapacityConfig,
    ExpertGroupsConfig,
    GateConfig,
    SharedExpertsConfig,
)
from vl_jax.moe.layer import MoEOutput, router_logits, sparse_mlp
from vl_jax.moe.routing import ExpertChoice, MoEConfig, RoutingContext, RoutingStats, TokenChoice
from vl_jax.schema import ConfigError, from_json, rebuild, to_json

G, T, D, E, K, F = 3, 8, 4, 4, 2, 4
NO_SHARED = SharedExpertsConfig(num=0)
CONFIGS = {
    "top_k": MoEConfig("top_k", E, K, F, shared=NO_SHARED, balance=BalanceConfig(weight=0.1, z_weight=0.01)),
    "top_k_softmax": MoEConfig("top_k_softmax", E, K, F, shared=NO_SHARED, balance=BalanceConfig(weight=0.1)),
    "loss_free": MoEConfig(
        "loss_free", E, K, F, shared=NO_SHARED, gates=GateConfig(normalize=True, scale=2.5)
    ),
    "expert_choice": MoEConfig(
        "expert_choice", E, K, F, shared=NO_SHARED, balance=BalanceConfig(z_weight=0.01)
    ),
}
every_scheme = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def weights():
    random, shapes = np.random.default_rng(0), ((D, E), (E, D, 2, F), (E, F, D))
    return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


def tokens(seed: int = 1, groups: int = G) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((groups, T, D), np.float32))


def context(valid: int | None = None, groups: int = G) -> RoutingContext:
    """The first ``valid`` tokens of each group; every third one is of a picture."""
    index = np.broadcast_to(np.arange(T), (groups, T))
    valid, modality = index < (T if valid is None else valid), (index % 3 == 0).astype(np.int32)
    return RoutingContext(jnp.asarray(valid), jnp.asarray(modality))


@functools.partial(jax.jit, static_argnums=0)
def _run(config, x, where, state):
    router, w_in, w_out = weights()
    logits = router_logits(x, router, None)
    assignment, found = routing.route(logits, where, state, config)
    y, stats = sparse_mlp(x, logits, assignment, ExpertWeights(w_in, w_out), context=where, config=config)
    return y, MoEOutput(stats=stats, losses=found)


def run(config, x, where):
    return _run(config, x, where, routing.init_state(config))


@functools.partial(jax.jit, static_argnums=0)
def _assign(config, logits, where, state):
    return routing.route(logits, where, state, config)


def assign(config, logits, where=None, state=None):
    state = routing.init_state(config) if state is None else state
    return _assign(config, logits, where or context(groups=logits.shape[0]), state)


@every_scheme
@pytest.mark.slow
def test_masked_tokens_choose_nothing_and_change_nothing(config):
    x, where = tokens(), context(valid=5)
    y, output = run(config, x, where)
    other, again = run(config, x.at[:, 5:].set(7.0), where)
    np.testing.assert_array_equal(y[:, 5:], 0.0)
    np.testing.assert_array_equal(y, other)
    jax.tree.map(np.testing.assert_array_equal, output, again)
    np.testing.assert_array_equal(output.stats.tokens, [3 * G, 2 * G])
    # Five tokens with K choices each; or E experts with ceil(5 K / E) tokens each.
    assert output.stats.load.sum() == G * (E * 3 if config.scheme == "expert_choice" else 5 * K)


@every_scheme
@pytest.mark.slow
def test_load_is_split_by_the_modality_of_the_token(config):
    one_kind = context().replace(modality=jnp.full((G, T), VISION))
    both, vision = run(config, tokens(), context())[1].stats, run(config, tokens(), one_kind)[1].stats
    np.testing.assert_array_equal(vision.load[TEXT], 0)
    np.testing.assert_array_equal(both.load.sum(0), vision.load[VISION])
    np.testing.assert_allclose(both.importance.sum(), G * T, rtol=1e-5)


def test_top_k_of_hand_worked_scores():
    logits = jnp.log(jnp.array([[[0.1, 0.4, 0.3, 0.2]]]))
    plain = dataclasses.replace(CONFIGS["top_k"], balance=BalanceConfig(weight=0.0))
    where = RoutingContext(jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    choice, found = assign(plain, logits, where)
    np.testing.assert_array_equal(choice.experts, [[[1, 2]]])
    np.testing.assert_allclose(choice.gates, [[[0.4, 0.3]]], rtol=1e-6)
    assert found == {}
    scaled = dataclasses.replace(plain, gates=GateConfig(normalize=True, scale=7.0))
    np.testing.assert_allclose(assign(scaled, logits, where)[0].gates, [[[4.0, 3.0]]], rtol=1e-6)
    single = dataclasses.replace(scaled, top_k=1)
    np.testing.assert_allclose(assign(single, logits, where)[0].gates, [[[7.0]]], rtol=1e-6)


def test_the_bias_selects_but_does_not_weigh():
    config = dataclasses.replace(CONFIGS["loss_free"], gates=GateConfig())
    logits = jnp.array([[[2.0, 1.0, 0.0, -1.0]]])
    where = RoutingContext(jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    choice, _ = assign(config, logits, where, {"bias": jnp.array([0.0, 0.0, 0.0, 5.0])})
    np.testing.assert_array_equal(choice.experts, [[[3, 0]]])
    np.testing.assert_allclose(choice.gates, jax.nn.sigmoid(jnp.array([[[-1.0, 2.0]]])), rtol=1e-6)


def stats(load) -> RoutingStats:
    load = jnp.array([load, [0] * len(load)], jnp.int32)
    zeros = jnp.zeros((2,), jnp.int32)
    return RoutingStats(load, load.astype(jnp.float32), zeros, zeros)


def test_the_bias_moves_by_its_rate_towards_balance():
    config = dataclasses.replace(CONFIGS["loss_free"], balance=BalanceConfig(bias_rate=0.5))
    moved = routing.update_state({"bias": jnp.array([1.0, 0.0, 0.0, 0.0])}, stats([6, 1, 3, 2]), config)
    np.testing.assert_allclose(moved["bias"], [0.5, 0.5, 0.0, 0.5])


def test_repeated_updates_of_the_bias_balance_the_load():
    config = dataclasses.replace(CONFIGS["loss_free"], balance=BalanceConfig(bias_rate=0.01))
    skew = jnp.array([1.5, 0.5, 0.0, -1.5])
    logits = jax.random.normal(jax.random.key(3), (64, T, E)) + skew[None, None]
    where, state = context(groups=64), routing.init_state(config)

    @jax.jit
    def step(state):
        assignment, _ = routing.route(logits, where, state, config)
        counted = balance.count(assignment, jnp.zeros((64, T, K), bool), jax.nn.softmax(logits), where)
        return routing.update_state(state, counted, config), balance.max_violation(counted.load.sum(0))

    state, first = step(state)
    for _ in range(150):
        state, last = step(state)
    assert first > 0.5 and last < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, T), st.sampled_from([0.5, 1.0, 1.2, 2.0]))
@pytest.mark.slow
def test_expert_choice_gives_every_expert_the_same_number_of_valid_tokens(seed, valid, factor):
    config = dataclasses.replace(CONFIGS["expert_choice"], limit=CapacityConfig(factor=factor))
    logits = jax.random.normal(jax.random.key(seed), (1, T, E))
    choice, _ = assign(config, logits, context(valid, groups=1))
    assert isinstance(choice, ExpertChoice)
    slots = min(valid, math.ceil(Fraction(str(factor)) * K * valid / E))
    np.testing.assert_array_equal((choice.gates[0] > 0).sum(-1), [slots] * E)
    assert (np.asarray(choice.tokens)[choice.gates > 0] < valid).all()


def test_expert_choice_takes_the_highest_scores():
    scores = jnp.array(
        [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]]
    )
    config = MoEConfig("expert_choice", E, 2, F)
    where = RoutingContext(jnp.ones((1, 4), bool), jnp.zeros((1, 4), jnp.int32))
    choice, _ = assign(config, jnp.log(scores)[None], where)
    np.testing.assert_array_equal(choice.tokens[0, :2], [[0, 2], [1, 2]])
    np.testing.assert_allclose(choice.gates[0, :2], [[0.7, 0.4], [0.7, 0.4]], rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    valid = jnp.ones(4, bool)
    even = losses.balance_loss(jnp.full((4, 4), 0.25), jnp.arange(4)[:, None], valid, scope="sequence")
    collapsed = losses.balance_loss(
        jnp.eye(4)[jnp.zeros(4, int)], jnp.zeros((4, 1), int), valid, scope="sequence"
    )
    np.testing.assert_allclose([even, collapsed], [1.0, 4.0], rtol=1e-6)


def test_balance_loss_of_hand_worked_scores():
    # Two valid tokens: both choose expert 0, one also 1 and one also 2; mean scores 0.5, 0.25, 0.25.
    scores = jnp.array([[0.6, 0.3, 0.1], [0.4, 0.2, 0.4], [0.0, 0.0, 1.0]])
    experts = jnp.array([[0, 1], [0, 2], [2, 1]])
    loss = losses.balance_loss(scores, experts, jnp.array([True, True, False]), scope="sequence")
    np.testing.assert_allclose(loss, 3 / (2 * 2) * (2 * 0.5 + 1 * 0.25 + 1 * 0.25), rtol=1e-6)


def test_balance_loss_moves_the_router_against_the_overloaded_expert():
    config = dataclasses.replace(CONFIGS["top_k"], balance=BalanceConfig(weight=0.1))
    logits = jnp.zeros((G, T, E)).at[:, :, 0].set(1.0).at[:, :, 1].set(0.5)
    gradient = jax.grad(lambda x: assign(config, x)[1]["balance"])(logits)
    assert (gradient[..., 0] > 0).all() and (gradient[..., 3] < 0).all()


def test_z_loss_is_the_mean_square_of_the_normaliser_over_valid_tokens():
    config = dataclasses.replace(CONFIGS["top_k"], balance=BalanceConfig(weight=0.0, z_weight=0.5))
    logits = jnp.full((1, T, E), 2.0).at[:, 3:].set(100.0)
    found = assign(config, logits, context(3, groups=1))[1]
    np.testing.assert_allclose(found["z"], 0.5 * (2 + np.log(4)) ** 2, rtol=1e-6)


def test_max_violation_and_dead_experts_of_hand_worked_loads():
    loads = jnp.array([[2, 2, 2, 2], [8, 0, 0, 0], [4, 0, 3, 1], [0, 0, 0, 0]])
    np.testing.assert_allclose(balance.max_violation(loads), [0.0, 3.0, 1.0, -1.0])
    np.testing.assert_array_equal(balance.dead_experts(loads), [0, 3, 1, 4])


@pytest.mark.slow
def test_fan_out_counts_the_shards_of_a_tokens_choices():
    experts = jnp.array([[[0, 1], [2, 5], [6, 7], [8, 8]]])  # of eight; the last token is padding
    valid = jnp.array([[True, True, True, False]])
    context = RoutingContext(valid=valid, modality=jnp.zeros((1, 4), jnp.int32))
    found = TokenChoice(experts, jnp.ones((1, 4, 2)))
    stats = balance.count(found, jnp.zeros((1, 4, 2), bool), jnp.ones((1, 4, 8)), context)
    assert balance.fan_out_shards(8) == (1, 2, 4, 8)
    np.testing.assert_array_equal(stats.destinations, [3, 4, 4, 6])
    figures = balance.summarize(jax.tree.map(lambda a: a[None], stats))
    np.testing.assert_allclose(figures["fan_out"], [[1, 4 / 3, 4 / 3, 2]])


@pytest.mark.slow
def test_chance_of_single_batches_averages_out_of_the_running_load():
    def stats(*load):
        return RoutingStats(jnp.array([[load]]), jnp.zeros((1, 1, 2)), jnp.ones((1, 1)), jnp.zeros((1, 1)))

    load = jnp.zeros((1, 2))
    for step in range(400):  # all to one expert in turns: MaxVio is 1 in every batch
        load = balance.running_load(load, stats(*((7, 0) if step % 2 else (0, 3))))
    assert float(balance.max_violation(load)[0]) < 0.01
    for _ in range(400):
        load = balance.running_load(load, stats(3, 1))
    np.testing.assert_allclose(balance.max_violation(load), [0.5], rtol=0.03)
    np.testing.assert_allclose(jnp.sum(load), 100.0, rtol=1e-2)


def test_summary_has_shares_within_each_modality_and_the_drop_rate():
    one = RoutingStats(
        load=jnp.array([[[3, 1], [0, 4]]]),
        importance=jnp.zeros((1, 2, 2)),
        tokens=jnp.array([[4, 4]]),
        dropped=jnp.array([[1, 1]]),
    )
    figures = balance.summarize(one)
    np.testing.assert_allclose(figures["load"], [[[0.75, 0.25], [0.0, 1.0]]])
    np.testing.assert_allclose(figures["maxvio"], [0.25])
    np.testing.assert_allclose(figures["drop_rate"], [0.25])


def test_activations_in_bfloat16_change_one_choice_in_five_hundred():
    """The router multiplies and chooses in float32: all that is lost is what rounding its input loses."""
    x = jax.random.normal(jax.random.key(0), (1, 2048, 256))
    router = jax.random.normal(jax.random.key(1), (256, 64))
    rounded = x.astype(jnp.bfloat16)
    exact = router_logits(rounded.astype(jnp.float32), router, None)
    np.testing.assert_array_equal(router_logits(rounded, router, None), exact)
    logits = router_logits(x, router, None), exact
    before, after = (jax.nn.one_hot(jax.lax.top_k(z, 6)[1], 64).sum(2) for z in logits)
    assert jnp.mean(jnp.maximum(before - after, 0.0)) * 64 / 6 < 1 / 500


@pytest.mark.slow
def test_dropped_choices_are_counted_by_modality():
    config = dataclasses.replace(CONFIGS["top_k"], limit=CapacityConfig(factor=0.5))
    counted = run(config, tokens(), context())[1].stats
    full = run(CONFIGS["top_k"], tokens(), context())[1].stats
    np.testing.assert_array_equal(counted.load, full.load)  # load is what was asked for
    slots = int(np.ceil(0.5 * K / E * T))
    choice, _ = assign(CONFIGS["top_k"], router_logits(tokens(), weights()[0], None))
    load = np.array([np.bincount(group, minlength=E) for group in choice.experts.reshape(G, -1)])
    assert counted.dropped.sum() == np.maximum(load - slots, 0).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be from 1 to num_experts=64"),
        ({"num_experts": 2, "top_k": 3}, "top_k=3 must be from 1 to num_experts=2"),
        (
            {"scheme": "expert_choice", "limit": CapacityConfig(priority="gate")},
            "limit.priority='gate' has no",
        ),
        ({"expert_dim": 0}, "expert_dim=0 must be >= 1"),
        ({"groups": ExpertGroupsConfig(num=3)}, "groups.num=3 must divide num_experts=64 into equal groups"),
        ({"groups": ExpertGroupsConfig(32, 2)}, "top_k=6 must be at most the 4 experts of groups.top=2"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**options)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (SharedExpertsConfig, {"num": -1}, "num=-1 must be >= 0"),
        (ExpertGroupsConfig, {"num": 0}, "num=0 must be >= 1"),
        (ExpertGroupsConfig, {"num": 4, "top": 5}, "top=5 must be from 1 to num=4"),
        (CapacityConfig, {"factor": 0.0}, "factor=0.0 must be > 0"),
        (CapacityConfig, {"slots": 0}, "slots=0 must be >= 1"),
        (CapacityConfig, {"factor": 1.0, "slots": 2}, "slots=2 and factor=1.0 exclude each other"),
    ],
)
def test_a_group_of_options_has_rules_of_its_own(group, options, message):
    with pytest.raises(ValueError, match=message):
        group(**options)


def test_a_name_that_is_no_scheme_gets_the_nearest():
    with pytest.raises(
        ValueError, match="scheme='expert_choise': no built-in .* did you mean 'expert_choice'"
    ):
        MoEConfig("expert_choise")
    with pytest.raises(ValueError, match="there are: top_k, top_k_softmax, "):
        MoEConfig("zzz")


def test_an_option_that_the_scheme_does_not_have_gets_the_nearest():
    with pytest.raises(ValueError, match="scheme='top_p' has no option 'treshold'; did you mean 'threshold'"):
        MoEConfig("top_p", options=(("treshold", 0.5),))
    with pytest.raises(ValueError, match="scheme='top_k_softmax' has no option 'x'; there are: none"):
        MoEConfig("top_k_softmax", options=(("x", 0.5),))
    with pytest.raises(ValueError, match="options name 'limit' more than once"):
        MoEConfig("top_p", options=(("limit", 2.0), ("limit", 3.0)))


def test_an_option_is_its_default_unless_given():
    assert MoEConfig("top_p").option("threshold") == 0.4
    assert MoEConfig("top_p", options=(("threshold", 0.7),)).option("threshold") == 0.7


OWN = """
import jax
from vl_jax.moe.routing import MoEConfig, Scheme, TokenChoice

def plain(logits, context, state, config):
    gates, experts = jax.lax.top_k(jax.nn.softmax(logits), config.top_k)
    return TokenChoice(experts, gates), {}

sharp = Scheme(plain, defaults={"heat": 1.0})
number = 3
CONFIG = MoEConfig(f"{__file__}:sharp", options=(("heat", 2.0),))
"""


def test_a_scheme_of_ones_own_file_survives_json_and_view(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    config = MoEConfig(f"{file}:sharp", E, K, F, options=(("heat", 0.5),))
    assert from_json(to_json(config), type(config)) == config
    pytest.importorskip("ml_collections")
    assert rebuild(view(config)) == config
    assert config.option("heat") == 0.5 and routing.is_causal(config)
    choice, _ = assign(config, jnp.zeros((1, T, E)).at[..., 2].set(1.0))
    np.testing.assert_array_equal(choice.experts[..., 0], 2)
    assert routing.scheme_of(MoEConfig(f"{file}:plain")).defaults == {}
    file.unlink()
    text = to_json(config).replace(":sharp", ":other")
    with pytest.raises(ConfigError, match="config: scheme='.*own.py:other': no file .*own.py"):
        from_json(text, MoEConfig)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (OWN, "missing", "expected a Scheme or a route function, found nothing of that name"),
        (OWN, "number", "expected a Scheme or a route function, found int"),
        ("x = 1\n1 / 0\n", "mine", "own.py:2: ZeroDivisionError: division by zero"),
        ("def mine(:\n", "mine", "own.py:1: SyntaxError: "),
    ],
)
def test_a_file_without_the_scheme_is_one_line_with_the_place(tmp_path, source, name, message):
    file = tmp_path / "own.py"
    file.write_text(source)
    with pytest.raises(ValueError) as error:
        MoEConfig(f"{file}:{name}")
    assert f"scheme='{file}:{name}': " in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_without_a_name_says_how_to_give_one():
    with pytest.raises(ValueError, match="write my.py:name"):
        MoEConfig("my.py")


OWN_SCORES = {
    "top_k": ({"gates": GateConfig(score="sigmoid")}, [0.5, 0.25, 0.25, 0.0]),
    "loss_free": ({}, [0.5, 0.25, 0.25, 0.0]),
    "expert_threshold": ({"gates": GateConfig(score="sigmoid")}, [0.5, 0.25, 0.25, 0.0]),
    "modality_top_k": ({"top_k": 1}, [0.75, 0.25, 0.0, 0.0]),  # logits log 3 and 0, of text experts alone
    "remoe": ({}, [1.0, 0.0, 0.0, 0.0]),
    "gshard": ({}, [0.6, 0.2, 0.2, 0.0]),
}


@pytest.mark.parametrize("scheme", OWN_SCORES)
def test_probabilities_in_statistics_are_the_schemes_own_scores(scheme):
    """Logits are large, 0, 0 and small: sigmoids are 1, 1/2, 1/2, 0; or the first is log 3, for a softmax."""
    options, expected = OWN_SCORES[scheme]
    first = np.log(3.0) if scheme in ("modality_top_k", "gshard", "remoe") else 40.0
    config = MoEConfig(scheme, **{"num_experts": E, "top_k": K, "expert_dim": F, **options})
    logits = jnp.array([[[first, 0.0, 0.0, -40.0]]])
    where = RoutingContext(jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(routing.probabilities(logits, where, config)[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["hash", "modality_expert_choice"])
@pytest.mark.slow
def test_probabilities_of_schemes_that_look_at_what_a_token_is(scheme):
    where = context().replace(tokens=jnp.arange(G * T, dtype=jnp.int32).reshape(G, T))
    config = MoEConfig(scheme, E, K, F)
    logits = jax.random.normal(jax.random.key(0), (G, T, E))
    found = np.asarray(routing.probabilities(logits, where, config))
    text = np.asarray(where.modality) == TEXT
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-5)
    if scheme == "hash":
        np.testing.assert_allclose(np.sort(found[text]), [[0, 0, 0.5, 0.5]] * int(text.sum()))
        np.testing.assert_allclose(found[~text], jax.nn.softmax(logits)[~text], rtol=1e-6)
    else:
        assert not found[text][:, 2:].any() and not found[~text][:, :2].any()
