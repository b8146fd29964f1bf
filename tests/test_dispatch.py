"""Dispatch: plans keep every choice, and permute and combine have the gradients of the dense definition."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.combine import combine
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.permute import permute
from vl_jax.moe import dispatch, slots
from vl_jax.moe.config import CapacityConfig
from vl_jax.moe.dispatch import apply_capacity, make_plan
from vl_jax.moe.routing import ExpertChoice, MoEConfig, TokenChoice

G, T, D, E, K, F = 2, 6, 3, 4, 2, 5
UNUSED = E
choices = st.lists(st.integers(0, UNUSED), min_size=G * T * K, max_size=G * T * K)


def token_choice(experts: list[int], seed: int = 0) -> TokenChoice:
    array = np.array(experts, np.int32).reshape(G, T, K)
    gates = np.random.default_rng(seed).uniform(0.1, 1.0, (G, T, K)).astype(np.float32)
    return TokenChoice(jnp.asarray(array), jnp.asarray(np.where(array < E, gates, np.float32(0))))


def expert_choice(seed: int) -> ExpertChoice:
    random = np.random.default_rng(seed)
    tokens = np.stack([[random.permutation(T)[:3] for _ in range(E)] for _ in range(G)])
    gates = random.random((G, E, 3), np.float32)
    gates[:, :, 2] = 0
    return ExpertChoice(jnp.asarray(tokens, jnp.int32), jnp.asarray(gates))


def dense(x, assignment, w_in, w_out):
    """Every expert on every token, weighted by the gates: the definition that dispatch must reproduce."""
    gate, up = jnp.einsum("GTD,EDF->GTEF", x, w_in[:, :, 0]), jnp.einsum("GTD,EDF->GTEF", x, w_in[:, :, 1])
    outputs = jnp.einsum("GTEF,EFD->GTED", jax.nn.silu(gate) * up, w_out)
    if isinstance(assignment, ExpertChoice):
        weights = jnp.einsum("GEC,GECT->GTE", assignment.gates, jax.nn.one_hot(assignment.tokens, T))
    else:
        weights = jnp.einsum("GTK,GTKE->GTE", assignment.gates, jax.nn.one_hot(assignment.experts, E))
    return jnp.einsum("GTE,GTED->GTD", weights, outputs)


def inputs():
    random, shapes = np.random.default_rng(9), ((G, T, D), (E, D, 2, F), (E, F, D))
    return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


@jax.jit
def both(assignment, upstream):
    """(output, gradients) of dispatch and of the dense definition."""
    x, w_in, w_out = inputs()

    def of(function):
        def apply(x, gates, w_in, w_out):
            return function(x, assignment.replace(gates=gates), w_in, w_out)

        y, pullback = jax.vjp(apply, x, assignment.gates, w_in, w_out)
        return y, pullback(upstream)

    def sparse(x, assignment, w_in, w_out):
        experts = ExpertWeights(w_in, w_out)
        return dispatch.apply_experts(x, assignment, experts, activation=SWIGLU, kernel="reference")

    return of(sparse), of(dense)


def check(assignment):
    upstream = np.random.default_rng(5).standard_normal((G, T, D), np.float32)
    (y, grads), (expected, expected_grads) = both(assignment, upstream)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    names = ("x", "gates", "w_in", "w_out")
    for name, a, b in zip(names, grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(choices, st.integers(0, 9))
def test_token_choices_have_output_and_gradients_of_the_dense_definition(experts, seed):
    check(token_choice(experts, seed))


@pytest.mark.parametrize("expert", [0, 3, UNUSED])
def test_one_expert_may_take_everything(expert):
    check(token_choice([expert] * (G * T * K)))


@pytest.mark.parametrize("seed", range(3))
def test_expert_choices_have_output_and_gradients_of_the_dense_definition(seed):
    check(expert_choice(seed))


planned = jax.jit(functools.partial(make_plan, num_experts=E))


@jax.jit
def there_and_back(x, gates, assignment):
    plan = make_plan(assignment, num_experts=E)
    return combine(permute(x, plan.moves), gates, plan.choice, plan.moves)


@settings(max_examples=50, deadline=None)
@given(choices)
def test_a_plan_holds_every_used_choice_once_in_the_order_of_experts(experts):
    assignment = token_choice(experts)
    plan = planned(assignment)
    flat = np.array(experts)
    used = flat[flat < E]
    np.testing.assert_array_equal(plan.group_sizes, np.bincount(used, minlength=E))
    rows = len(used)
    np.testing.assert_array_equal(flat[np.asarray(plan.choice)[:rows]], np.sort(used))
    np.testing.assert_array_equal(np.sort(plan.choice), np.arange(len(flat)))
    np.testing.assert_array_equal(plan.moves.source, np.asarray(plan.choice) // K)
    inverse = np.asarray(plan.moves.inverse).reshape(-1)
    np.testing.assert_array_equal(inverse == len(flat), flat == UNUSED)
    np.testing.assert_array_equal(np.asarray(plan.choice)[inverse[flat < E]], np.flatnonzero(flat < E))


@settings(max_examples=30, deadline=None)
@given(choices)
def test_permute_then_combine_with_gates_of_one_counts_the_choices_of_a_token(experts):
    assignment = token_choice(experts)
    x = np.arange(G * T * D, dtype=np.float32).reshape(-1, D)
    ones = np.where(np.array(experts) < E, np.float32(1), np.float32(0)).reshape(-1, K)
    np.testing.assert_allclose(there_and_back(x, ones, assignment), x * ones.sum(1)[:, None])


def config(**options) -> MoEConfig:
    return MoEConfig(**{"num_experts": E, "top_k": K, "expert_dim": F, **options})


_limited = jax.jit(apply_capacity, static_argnums=2)


def limited(assignment, valid, limit: CapacityConfig):
    kept, dropped = _limited(assignment, valid, config(limit=limit))
    return np.asarray(kept.experts), np.asarray(kept.gates), np.asarray(dropped)


ALL_VALID = jnp.ones((G, T), bool)


@settings(max_examples=40, deadline=None)
@given(choices, st.sampled_from(["position", "gate", "rank"]), st.sampled_from([0.1, 0.5, 1.0, 1.2, 1.5]))
@pytest.mark.slow
def test_no_expert_takes_more_than_its_slots_and_none_drops_while_it_has_room(experts, priority, factor):
    assignment = token_choice(experts)
    kept, gates, dropped = limited(assignment, ALL_VALID, CapacityConfig(factor, priority=priority))
    slots = math.ceil(Fraction(str(factor)) * K * T / E)
    for group in range(G):
        wanted = np.bincount(np.asarray(assignment.experts)[group].ravel(), minlength=E + 1)[:E]
        taken = np.bincount(kept[group].ravel(), minlength=E + 1)[:E]
        np.testing.assert_array_equal(taken, np.minimum(wanted, slots))
        assert dropped[group].sum() == (wanted - taken).sum()
    np.testing.assert_array_equal(gates > 0, kept < E)
    np.testing.assert_array_equal(kept[~dropped], np.asarray(assignment.experts)[~dropped])


@pytest.mark.slow
def test_position_priority_keeps_the_first_tokens():
    everyone_wants_expert_0 = TokenChoice(
        jnp.zeros((1, T, 1), jnp.int32), jnp.linspace(0.1, 0.9, T).reshape(1, T, 1)
    )
    kept, _ = apply_capacity(
        everyone_wants_expert_0, ALL_VALID[:1], config(top_k=1, limit=CapacityConfig(2.0))
    )
    np.testing.assert_array_equal(kept.experts[0, :, 0], [0, 0, 0, E, E, E])  # ceil(2 * 6 * 1 / 4) = 3


def test_gate_priority_keeps_the_highest_gates():
    gates = jnp.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7]).reshape(1, T, 1)
    everyone = TokenChoice(jnp.zeros((1, T, 1), jnp.int32), gates)
    options = config(top_k=1, limit=CapacityConfig(2.0, priority="gate"))
    kept, dropped = apply_capacity(everyone, ALL_VALID[:1], options)
    np.testing.assert_array_equal(kept.experts[0, :, 0], [E, 0, E, 0, E, 0])
    np.testing.assert_array_equal(dropped[0, :, 0], [True, False, True, False, True, False])


def test_rank_priority_gives_slots_to_first_choices_before_any_second():
    """Five tokens, three experts with two slots each, worked by hand.

    Tokens choose, best first:   0: A B   1: B A   2: A C   3: C A   4: B C
    The queues by rank:          A: 0 2, then 1 3;  B: 1 4, then 0;  C: 3, then 2 4
    The queues by position:      A: 0 1 2 3;        B: 0 1 4;        C: 2 3 4
    """
    experts = jnp.array([[[0, 1], [1, 0], [0, 2], [2, 0], [1, 2]]], jnp.int32)
    assignment = TokenChoice(experts, jnp.full(experts.shape, 0.5))
    dropped = {
        priority: apply_capacity(
            assignment,
            jnp.ones((1, 5), bool),
            config(num_experts=3, limit=CapacityConfig(slots=2, priority=priority)),
        )[1][0].tolist()
        for priority in ("rank", "position")
    }
    no, yes = False, True
    assert dropped["rank"] == [[no, yes], [no, yes], [no, no], [no, yes], [no, yes]]
    assert dropped["position"] == [
        [no, no],
        [no, no],
        [yes, no],
        [no, yes],
        [yes, yes],
    ]  # token 4 has nothing


@settings(max_examples=40, deadline=None)
@given(choices, st.integers(0, 2**16), st.integers(1, 5))
@pytest.mark.slow
def test_slots_are_given_out_as_a_loop_would(experts, seed, slots):
    """A queue in the order of each priority, served choice by choice."""
    ids = np.array(experts).reshape(G, T, K)
    gates = np.random.default_rng(seed).permutation(G * T * K).reshape(G, T, K).astype(np.float32) + 1
    gates[ids == E] = 0
    orders = {
        "position": lambda g: [(t, k) for t in range(T) for k in range(K)],
        "rank": lambda g: [(t, k) for k in range(K) for t in range(T)],
        "gate": lambda g: sorted(orders["position"](g), key=lambda place: -gates[g][place]),
    }
    for priority, order in orders.items():
        limit = CapacityConfig(slots=slots, priority=priority)
        dropped = limited(TokenChoice(jnp.asarray(ids, jnp.int32), jnp.asarray(gates)), ALL_VALID, limit)[2]
        for group in range(G):
            taken = np.zeros(E + 1, int)
            for place in order(group):
                expert = ids[group][place]
                assert dropped[group][place] == (expert < E and taken[expert] >= slots), (priority, place)
                taken[expert] += 1


@settings(max_examples=30, deadline=None)
@given(choices, choices, st.integers(1, T - 1))
def test_with_position_priority_a_token_never_loses_to_a_later_one(experts, others, cut):
    before = np.array(experts).reshape(G, T, K)
    after = before.copy()
    after[:, cut:] = np.array(others).reshape(G, T, K)[:, cut:]
    kept, changed = (
        limited(token_choice(e.ravel().tolist()), ALL_VALID, CapacityConfig(0.5))[0] for e in (before, after)
    )
    np.testing.assert_array_equal(kept[:, :cut], changed[:, :cut])


def test_slots_count_the_valid_tokens_of_the_group():
    experts = [0] * (G * T * K)
    valid = jnp.arange(T)[None] < jnp.array([[2], [6]])
    kept = limited(token_choice(experts), valid, CapacityConfig(1.0))[0]
    np.testing.assert_array_equal((kept == 0).sum((1, 2)), [1, 3])  # ceil(n * 2 / 4)


def test_without_a_capacity_nothing_is_dropped():
    assignment = token_choice([0] * (G * T * K))
    kept, dropped = apply_capacity(assignment, ALL_VALID, config())
    assert kept is assignment and not dropped.any()


FACTORS = [Fraction(i, 20) for i in range(1, 81)]  # 0.05 to 4
LENGTHS = np.arange(8, 4097, 8, dtype=np.int32)


@pytest.mark.parametrize("num_experts", [2, 60, 64, 256])
def test_slots_are_counted_exactly_on_host_and_device(num_experts):
    for top_k, factor in itertools.product((1, 2, 6, 16), FACTORS):
        share = slots.as_fraction(float(factor)) * top_k / num_experts
        assert share == factor * top_k / num_experts
        exact = -(-LENGTHS.astype(np.int64) * share.numerator // share.denominator)
        np.testing.assert_array_equal(slots.ceil_times(LENGTHS, share, most=4096), exact)
    for factor in (1.1, 1.2, 0.05 * 23):
        c = MoEConfig(num_experts=num_experts, top_k=2, limit=CapacityConfig(factor=factor))
        on_device = slots.ceil_times(jnp.asarray(LENGTHS), c.slots_per_token, most=4096)
        assert on_device.dtype == jnp.int32
        np.testing.assert_array_equal(on_device, [c.capacity_of(int(n)) for n in LENGTHS])


@settings(max_examples=60, deadline=None)
@given(
    st.fractions(min_value="0.0001", max_value=64, max_denominator=slots.FINEST),
    st.integers(1, 16),
    st.integers(2, 2048),
    st.integers(1, 2**20),
)
def test_slots_never_overflow_the_integers_of_a_device(factor, top_k, num_experts, length):
    share = min(factor * top_k / num_experts, 1000)
    counts = np.array([0, 1, length // 3, length - 1, length], np.int32)
    exact = [math.ceil(int(n) * share) for n in counts]
    with np.errstate(over="raise"):
        np.testing.assert_array_equal(slots.ceil_times(counts, share, most=length), exact)
    assert [slots.ceil_times(int(n), share, most=length) for n in counts] == exact


@pytest.mark.parametrize("factor", [1.2, 1 / 3, 0.15000000000000002, 1e-9, 7.0])
def test_a_factor_is_the_fraction_that_is_meant(factor):
    expected = {1.2: Fraction(6, 5), 1 / 3: Fraction(1, 3), 7.0: 7, 1e-9: Fraction(1, slots.FINEST)}
    assert slots.as_fraction(factor) == expected.get(factor, Fraction(3, 20))


def test_more_slots_than_choices_are_no_overflow():
    assignment = token_choice([0] * (G * T * K))
    for limit in (CapacityConfig(1e12), CapacityConfig(slots=2**40)):
        assert not apply_capacity(assignment, ALL_VALID, config(limit=limit))[1].any()
    with pytest.raises(ValueError, match="factor=inf must be > 0 and finite"):
        CapacityConfig(float("inf"))
