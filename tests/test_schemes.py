"""The built-in routing schemes do what their papers say: hand-worked values and properties of each."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.batch import MODALITIES, TEXT, VISION
from vl_jax.moe import balance, losses, noise, routing
from vl_jax.moe.assignment import ExpertChoice, RoutingContext, RoutingStats, Soft, TokenChoice
from vl_jax.moe.config import BalanceConfig, CapacityConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.schemes import dynamic, fixed, token_choice

G, T, E, K, F = 2, 8, 4, 2, 4
seeds = st.integers(0, 2**16)


def config(scheme: str, *, options: dict[str, float] | None = None, **fields) -> MoEConfig:
    sizes = {"num_experts": E, "top_k": K, "expert_dim": F, "shared": SharedExpertsConfig(num=0)}
    fields = {**sizes, "balance": BalanceConfig(weight=0.0), **fields}
    return MoEConfig(scheme, options=tuple((options or {}).items()), **fields)


def context(valid: int = T, *, rng: int | None = None, groups: int = G) -> RoutingContext:
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (groups, T))
    return RoutingContext(
        valid=jnp.asarray(index < valid),
        modality=jnp.asarray((index % 2).astype(np.int32)),
        tokens=jnp.asarray(index),
        rng=None if rng is None else jax.random.split(jax.random.key(rng), groups),
    )


def logits(seed: int = 0, columns: int = E) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((G, T, columns), np.float32))


@functools.partial(jax.jit, static_argnums=3)
def _route(logits, context, state, config):
    return routing.route(logits, context, state, config)


def assign(config: MoEConfig, logits: jax.Array, where: RoutingContext | None = None, state=None):
    state = routing.init_state(config) if state is None else state
    return jax.device_get(_route(logits, where or context(), state, config))


def rows(*values: list[float]) -> jax.Array:
    """The same few logits in every group; the tokens after them are zero."""
    filled = np.zeros((G, T, len(values[0])), np.float32)
    filled[:, : len(values)] = values
    return jnp.asarray(filled)


def stats(load, tokens: int, **measured) -> RoutingStats:
    load = jnp.array([load, [0] * len(load)], jnp.int32)
    counts = jnp.array([tokens, 0], jnp.int32)
    return RoutingStats(load, load.astype(jnp.float32), counts, jnp.zeros_like(counts), measured)


def test_switch_takes_the_best_expert_and_weighs_it_by_its_probability():
    choice, _ = assign(config("switch", top_k=1), jnp.log(rows([0.1, 0.6, 0.2, 0.1]) + 1e-9))
    np.testing.assert_array_equal(choice.experts[:, 0], 1)
    np.testing.assert_allclose(choice.gates[:, 0], 0.6, rtol=1e-5)


def test_gshard_keeps_the_second_expert_in_proportion_to_its_gate():
    where = context(rng=0, groups=400)
    wide = jnp.broadcast_to(jnp.log(jnp.array([0.72, 0.18, 0.06, 0.04])), (400, T, E))
    choice, _ = assign(config("gshard"), wide, where)
    kept = np.asarray(choice.experts[..., 1]) == 1
    assert abs(kept.mean() - 2 * 0.2) < 0.03  # gates of the two are 0.8 and 0.2
    np.testing.assert_allclose(choice.gates[..., 0], 0.8, rtol=1e-5)
    np.testing.assert_allclose(choice.gates[..., 1], np.where(kept, 0.2, 0.0), rtol=1e-5)
    assert (assign(config("gshard"), wide[:G])[0].experts[..., 1] == 1).all()  # no noise in evaluation


def test_noisy_top_k_has_no_noise_in_evaluation_and_weighs_the_kept_logits_only():
    clean, raw = rows([3.0, 1.0, 2.0, 0.0]), jnp.zeros((G, T, E))
    choice, _ = assign(config("noisy_top_k"), jnp.concatenate([clean, raw], -1))
    np.testing.assert_array_equal(choice.experts[:, 0], [[0, 2]] * G)
    np.testing.assert_allclose(choice.gates[0, 0], jax.nn.softmax(jnp.array([3.0, 2.0])), rtol=1e-6)


def test_the_load_of_noisy_top_k_is_the_chance_that_new_noise_keeps_an_expert():
    """Appendix A of the paper, by drawing the noise of one expert again and again."""
    clean, others = np.array([0.5, 0.2, -0.1, 0.0]), np.array([0.5, 0.9, -0.4, 0.3])
    beaten = token_choice._to_beat(jnp.asarray(others[None], jnp.float32), 2)[0]
    np.testing.assert_allclose(beaten, [0.3, 0.3, 0.5, 0.5], rtol=1e-6)
    chance = jax.scipy.stats.norm.cdf((clean[0] - beaten[0]) / 0.7)
    drawn = clean[0] + 0.7 * np.random.default_rng(0).standard_normal(20_000)
    kept = [sum(o > d for o in others[1:]) < 2 for d in drawn]
    np.testing.assert_allclose(chance, np.mean(kept), atol=0.01)


def test_variation_is_zero_for_equal_sums_and_by_hand_for_others():
    valid = jnp.array([True, True, False])
    even = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 0.0]])
    np.testing.assert_allclose(losses.variation_loss(even, valid, scope="sequence"), 0.0, atol=1e-9)
    skew = jnp.array([[1.0, 0.0], [2.0, 1.0], [0.0, 9.0]])  # sums 3 and 1: variance 1, mean 2
    np.testing.assert_allclose(losses.variation_loss(skew, valid, scope="sequence"), 0.25, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, T))
def test_the_transport_plan_is_even_over_experts_and_one_for_every_token(seed, valid):
    mask = jnp.arange(T) < valid
    plan = jax.jit(token_choice.sinkhorn_plan, static_argnames="iterations")(
        logits(seed)[0], mask, iterations=100
    )
    plan = np.exp(np.asarray(plan))[:valid]
    np.testing.assert_allclose(plan.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(plan.sum(0), valid / E, rtol=0.02)


def test_sinkhorn_evens_a_skewed_load_in_training_and_is_greedy_in_evaluation():
    skewed = logits() + jnp.array([3.0, 0.0, 0.0, 0.0])
    c = config("sinkhorn", top_k=1)
    greedy, trained = (assign(c, skewed, context(rng=r))[0].experts for r in (None, 0))
    assert (greedy == 0).mean() > 0.8
    assert np.bincount(trained.ravel(), minlength=E).max() <= 6  # of 16, 4 each if even


def test_the_bias_of_each_modality_follows_its_own_load():
    c = config("modality_bias", balance=BalanceConfig(weight=0.0, bias_rate=0.5))
    load = jnp.array([[4, 0, 2, 2], [0, 2, 1, 1]])
    counted = stats([0] * E, 1).replace(load=load)
    bias = routing.update_state(routing.init_state(c), counted, c)["bias"]
    np.testing.assert_allclose(bias, [[-0.5, 0.5, 0, 0], [0.5, -0.5, 0, 0]])
    choice, _ = assign(c, jnp.zeros((G, T, E)), state={"bias": bias})
    np.testing.assert_array_equal(choice.experts[:, 0, 0], 1)  # text
    np.testing.assert_array_equal(choice.experts[:, 1, 0], 0)  # a picture


def test_the_balance_loss_of_the_step_weighs_probabilities_by_the_load_of_the_last_one():
    c = config("top_k", balance=BalanceConfig(weight=1.0, scope="step"))
    fresh = routing.init_state(c)
    values = jnp.log(jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3, 0.4]), (G, T, E)))
    np.testing.assert_allclose(assign(c, values, state=fresh)[1]["balance"], 1.0, rtol=1e-6)
    moved = routing.update_state(fresh, stats([0, 0, 1, 3], 2), c)
    np.testing.assert_allclose(moved["share"], [0, 0, 0.25, 0.75])
    expected = E * (0.25 * 0.3 + 0.75 * 0.4)
    np.testing.assert_allclose(assign(c, values, state=moved)[1]["balance"], expected, rtol=1e-6)


def test_entropy_losses_of_hand_worked_probabilities():
    weights = {"text_local_entropy": 2.0, "text_global_entropy": 1.0, "vision_global_entropy": 1.0}
    options = {**weights, "min_experts": 2.0}
    c = config("top_k", options=options)
    # Text tokens are sure of expert 0; those of pictures are torn between all four.
    values = jnp.zeros((G, T, E)).at[:, ::2, 0].set(50.0)
    found = assign(c, values)[1]
    np.testing.assert_allclose(found["text_local_entropy"], 0.0, atol=1e-5)
    np.testing.assert_allclose(found["text_global_entropy"], math.log(2), rtol=1e-5)
    np.testing.assert_allclose(found["vision_global_entropy"], 0.0, atol=1e-6)  # uses four, more than two
    assert "vision_local_entropy" not in found


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([0.1, 0.4, 0.8, 0.99]))
def test_top_p_takes_the_fewest_experts_that_reach_p(seed, p):
    values = logits(seed)
    choice, _ = assign(config("top_p", options={"threshold": p}), values)
    probabilities = np.sort(np.asarray(jax.nn.softmax(values)), axis=-1)[..., ::-1]
    fewest = 1 + (np.cumsum(probabilities, axis=-1) < p).sum(-1)
    np.testing.assert_array_equal((choice.experts < E).sum(-1), np.minimum(fewest, E))
    gates = -np.sort(-choice.gates, axis=-1)
    np.testing.assert_allclose(gates, np.where(np.arange(E) < fewest[..., None], probabilities, 0), rtol=1e-5)


def test_a_limit_keeps_the_highest_of_a_varying_number():
    choice, _ = assign(config("remoe", options={"limit": 2}), rows([1.0, 3.0, -1.0, 2.0]))
    assert choice.experts.shape == (G, T, 2)
    np.testing.assert_array_equal(choice.experts[:, 0], [[1, 3]] * G)


def test_remoe_gates_are_the_positive_logits():
    choice, found = assign(
        config("remoe"), rows([1.0, -3.0, 0.0, 2.0]), state={"l1_weight": jnp.asarray(1.0)}
    )
    np.testing.assert_array_equal(np.sort(choice.experts[:, 0]), [[0, 3, E, E]] * G)
    np.testing.assert_allclose(choice.gates[:, 0].sum(-1), 3.0)
    # One token of eight uses experts 0 and 3: f = (1/8) * E/K each, and the mean gate-sum is f * 3 / 8.
    np.testing.assert_allclose(found["l1"], (E / K / 8) * 3 / 8, rtol=1e-6)


def test_the_l1_weight_drives_the_number_of_active_experts_to_top_k():
    c = config("remoe", options={"initial_l1": 1e-3, "l1_rate": 1.1})
    noise, where = logits(), context()

    @jax.jit
    def step(offset, state):
        def loss(offset):
            assignment, found = routing.route(noise + offset, where, state, c)
            return found["l1"] + 0.5 * jnp.sum((offset - 3.0) ** 2), assignment  # the task wants all experts

        gradient, assignment = jax.grad(loss, has_aux=True)(offset)
        counted = balance.count(assignment, jnp.zeros((G, T, 1), bool), jax.nn.softmax(noise), where)
        active = jnp.sum(counted.load) / (G * T)
        return offset - 0.3 * gradient, routing.update_state(state, counted, c), active

    offset, state, active = jnp.full((E,), 3.0), routing.init_state(c), []
    for _ in range(200):
        offset, state, now = step(offset, state)
        active.append(float(now))
    assert active[0] == E and abs(np.mean(active[-50:]) - K) < 0.25


def test_an_expert_takes_the_tokens_above_its_threshold():
    c = config("expert_threshold", gates=GateConfig(score="sigmoid"))
    values = rows([2.0, -2.0, 0.1, 0.0])
    choice, _ = assign(c, values, state={"threshold": jnp.array([0.5, 0.5, 0.6, 0.9])})
    np.testing.assert_array_equal(choice.experts[:, 0], [[0, E, E, E]] * G)


def test_thresholds_come_to_take_what_expert_choice_would():
    c = config("expert_threshold", options={"decay": 0.9})
    where, state = context(), routing.init_state(c)
    scheme = routing.scheme_of(c)

    @jax.jit
    def step(values, state):
        measured = jax.vmap(lambda z, w: scheme.measure(z, w, c))(values, where)
        measured = jax.tree.map(lambda a: jnp.sum(a, axis=0), measured)
        assignment, _ = routing.route(values, where, state, c)
        taken = jnp.mean(jnp.sum(assignment.experts < E, axis=-1, dtype=jnp.float32))
        return routing.update_state(state, stats([0] * E, 0, **measured), c), taken

    skew, taken = jnp.array([2.0, 1.0, 0.0, -1.0]), []
    for seed in range(80):
        state, now = step(logits(seed) + skew, state)
        taken.append(float(now))
    assert abs(np.mean(taken[-40:]) - K) < 0.4
    thresholds = np.asarray(state["threshold"])
    assert (np.diff(thresholds) < 0).all()  # who scores higher asks for more


def test_the_cutoff_is_the_lowest_score_that_expert_choice_takes():
    c, where = config("expert_threshold"), context(6)
    found = dynamic.measure_cutoff(logits()[0], jax.tree.map(lambda a: a[0], where), c)
    chosen = assign(config("expert_choice"), logits(), where)[0]
    lowest = np.where(chosen.gates[0] > 0, chosen.gates[0], 1.0).min(-1)
    np.testing.assert_allclose(found["cutoff"], lowest, rtol=1e-6)


def test_null_experts_take_choices_and_do_no_work():
    c = config("null_experts", options={"count": 2})
    values = rows([3.0, 0.0, 0.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 3.0, 2.0])
    choice, _ = assign(c, values)
    np.testing.assert_array_equal(choice.experts[:, :2], [[[0, E], [E, E]]] * G)
    np.testing.assert_allclose(choice.gates[:, 1], 0.0)
    np.testing.assert_allclose(choice.gates[0, 0, 0], jax.nn.softmax(values[0, 0])[0], rtol=1e-6)


@pytest.mark.slow
def test_a_lower_weight_of_null_experts_lets_the_balance_loss_favour_them():
    def pull(weight):
        options = {"count": 4, "null_weight": weight}
        c = config("null_experts", options=options, balance=BalanceConfig(weight=1.0))
        scheme = routing.scheme_of(c)
        where = jax.tree.map(lambda a: a[0], context())
        gradient = jax.jit(jax.grad(lambda z: scheme.route(z, where, {}, c)[1]["balance"]))
        return jnp.sum(gradient(0.01 * logits(columns=8)[0])[:, E:])

    assert pull(0.5) < pull(1.0) - 1e-3


def test_smooth_steps_are_zero_one_and_flat_at_both_ends():
    points = jnp.array([-3.0, -0.5, 0.0, 0.5, 3.0])
    np.testing.assert_allclose(dynamic.smooth_step(points, 1.0), [0, 0, 0.5, 1, 1], atol=1e-6)
    slopes = jax.vmap(jax.grad(lambda x: dynamic.smooth_step(x, 1.0)))(points)
    np.testing.assert_allclose(slopes, [0, 0, 1.5, 0, 0], atol=1e-6)


def test_dselect_k_picks_the_k_experts_of_its_codes_once_bits_are_sure():
    # Codes, lowest bit first: 3 and 2; weights 1/4 and 3/4.
    values = rows([5.0, 5.0, -5.0, 5.0, 0.0, math.log(3)])
    choice, _ = assign(config("dselect_k"), values)
    np.testing.assert_array_equal(choice.experts[:, 0], [[2, 3, E, E]] * G)
    np.testing.assert_allclose(choice.gates[:, 0], [[0.75, 0.25, 0, 0]] * G, rtol=1e-6)
    unsure, _ = assign(config("dselect_k"), 0.1 * logits(columns=6))
    np.testing.assert_allclose(unsure.gates.sum(-1), 1.0, rtol=1e-5)


def test_the_gates_of_dselect_k_have_the_gradient_of_finite_differences():
    c, where = config("dselect_k"), jax.tree.map(lambda a: a[0], context())
    scheme, values, weight = routing.scheme_of(c), 0.1 * logits(columns=6)[0], logits(1)[0]

    def total(z):
        choice, _ = scheme.route(z, where, {}, c)
        dense = jnp.sum(jax.nn.one_hot(choice.experts, E) * choice.gates[..., None], axis=1)
        return jnp.sum(dense * weight)

    direction = logits(2, columns=6)[0]
    total = jax.jit(total)
    slope = jnp.vdot(jax.jit(jax.grad(total))(values), direction)
    step = 1e-2
    difference = (total(values + step * direction) - total(values - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=5e-3)


def test_hashed_experts_differ_are_even_and_depend_on_the_id_only():
    experts = np.asarray(jax.lax.top_k(fixed.hashes(jnp.arange(20_000), 8), 3)[1])
    assert (np.sort(experts, axis=1)[:, 1:] != np.sort(experts, axis=1)[:, :-1]).all()
    for column in experts.T:
        np.testing.assert_allclose(np.bincount(column, minlength=8) / 20_000, 1 / 8, atol=0.01)
    again = jax.lax.top_k(fixed.hashes(jnp.array([7, 3, 7]), 8), 3)[1]
    np.testing.assert_array_equal(again, experts[[7, 3, 7]])


def test_hash_layers_ignore_the_router_for_text_and_follow_it_for_pictures():
    first, second = (assign(config("hash"), logits(seed))[0] for seed in (0, 1))
    text = np.asarray(context().modality) == TEXT
    np.testing.assert_array_equal(first.experts[text], second.experts[text])
    np.testing.assert_allclose(first.gates[text], 1 / K)
    np.testing.assert_array_equal(first.experts[~text], jax.lax.top_k(logits(0), K)[1][~text])


def test_hash_layers_without_token_ids_say_so():
    with pytest.raises(ValueError, match="scheme='hash' needs the token ids"):
        assign(config("hash"), logits(), context().replace(tokens=None))


def test_each_modality_has_its_own_experts():
    c = config("modality_top_k", num_experts=4, top_k=1, options={"vision_experts": 1})
    choice, _ = assign(c, logits())
    vision = np.asarray(context().modality) == VISION
    np.testing.assert_array_equal(choice.experts[vision], 3)
    np.testing.assert_allclose(choice.gates[vision], 1.0)  # of one expert there is no choice
    assert (choice.experts[~vision] < 3).all()


@pytest.mark.parametrize("share", [2, 1])
def test_expert_choice_within_a_modality_is_even_within_it(share):
    c = config("modality_expert_choice", top_k=1, options={"vision_experts": share})
    choice, _ = assign(c, logits())
    assert isinstance(choice, ExpertChoice)
    modality = np.asarray(context().modality)
    for expert in range(E):
        kind, peers = (VISION, share) if expert >= E - share else (TEXT, E - share)
        taken = choice.gates[0, expert] > 0
        assert taken.sum() == math.ceil(4 / peers)
        assert (modality[0, choice.tokens[0, expert][taken]] == kind).all()


def test_slots_and_tokens_of_soft_moe_are_means():
    c = config("soft_moe", options={"slots": 3})
    found, _ = assign(c, logits(columns=3 * E), context(5))
    assert isinstance(found, Soft) and found.dispatch.shape == (G, T, E, 3)
    np.testing.assert_allclose(found.dispatch.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.combine.sum((2, 3)), np.asarray(context(5).valid), rtol=1e-5)


def test_a_slot_counts_for_the_modality_that_fills_most_of_it():
    dispatch = jnp.zeros((1, 4, 2, 1)).at[0, :, 0, 0].set(jnp.array([0.6, 0.4, 0, 0])).at[0, 1, 1, 0].set(1.0)
    where = RoutingContext(jnp.ones((1, 4), bool), jnp.array([[TEXT, VISION, VISION, VISION]]))
    counted = balance.count(Soft(dispatch, dispatch), jnp.zeros((1, 4, 1), bool), jnp.zeros((1, 4, 2)), where)
    np.testing.assert_array_equal(counted.load, [[1, 0], [0, 1]])


def test_smear_weighs_experts_by_the_mean_router_of_the_row():
    values = logits()
    found, _ = assign(config("smear"), values, context(5))
    np.testing.assert_allclose(found.weights, jax.nn.softmax(values[:, :5].mean(1)), rtol=1e-5)


def test_tokens_of_a_merged_group_count_for_the_heaviest_expert():
    merged = routing.Merge(jnp.array([[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]))
    counted = balance.count(merged, jnp.zeros((G, T, 1), bool), jnp.zeros((G, T, E)), context(5))
    np.testing.assert_array_equal(counted.load, [[0, 3, 0, 3], [0, 2, 0, 2]])


def test_noise_follows_what_a_row_holds_and_not_where_it_stands():
    key, where = jax.random.key(3), context()
    tokens = jnp.array([[5, 6, 7, 8, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
    where = where.replace(tokens=tokens, valid=tokens > 0)
    keys = jax.random.key_data(noise.group_keys(key, where))
    swapped = jax.random.key_data(noise.group_keys(key, jax.tree.map(lambda a: a[::-1], where)))
    np.testing.assert_array_equal(swapped, keys[::-1])
    padded = noise.group_keys(key, where.replace(tokens=tokens.at[0, 4:].set(9)))
    np.testing.assert_array_equal(jax.random.key_data(padded), keys)
    assert (keys[0] != keys[1]).any()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
def test_noise_of_a_picture_follows_its_pixels(dtype):
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3)), dtype)
    where = jax.tree.map(lambda a: a[:1].repeat(3, 0), context()).replace(tokens=None)

    def keys(pixels):
        given = where.replace(content=noise.content_of(pixels))
        return np.asarray(jax.random.key_data(noise.group_keys(jax.random.key(3), given)))

    assert len({tuple(k) for k in keys(pixels)}) == 3
    np.testing.assert_array_equal(keys(pixels[::-1]), keys(pixels)[::-1])


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("switch", {"top_k": 2}, "scheme='switch': top_k=2 must be 1"),
        ("gshard", {"top_k": 1}, "scheme='gshard': top_k=1 must be 2"),
        ("dselect_k", {"num_experts": 6}, "scheme='dselect_k': num_experts=6 must be a power of two"),
        ("null_experts", {"options": {"count": 0}}, "scheme='null_experts': count=0 must be >= 1"),
        (
            "null_experts",
            {"balance": BalanceConfig(0.0, "step")},
            "balance.scope='step' knows no load of null experts",
        ),
        ("soft_moe", {"options": {"slots": 0}}, "scheme='soft_moe': slots=0 must be >= 1"),
        ("soft_moe", {"limit": CapacityConfig(factor=1.0)}, "limit has no meaning for scheme='soft_moe'"),
        ("smear", {"limit": CapacityConfig(slots=2)}, "limit has no meaning for scheme='smear'"),
        (
            "modality_top_k",
            {"options": {"vision_experts": 3}},
            "leaves 1 of 4 experts for text; both must be >= 2",
        ),
        (
            "expert_choice",
            {"limit": CapacityConfig(slots=3)},
            "limit.slots has no meaning for scheme='expert_choice'",
        ),
    ],
)
def test_settings_that_make_no_sense_for_a_scheme_name_it(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        config(scheme, **options)


def test_modalities_are_the_two_that_schemes_are_written_for():
    assert len(MODALITIES) == 2 and {TEXT, VISION} == {0, 1}
    assert isinstance(assign(config("top_k"), logits())[0], TokenChoice)
