"""What must hold of the decisions of every scheme, whatever layer it is in; see ``conformance``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.batch import MODALITIES
from vl_jax.moe import balance, routing
from vl_jax.moe.assignment import RoutingContext, TokenChoice, by_group
from vl_jax.moe.checks.decisions import (
    GROUPS,
    LENGTH,
    Broken,
    Decision,
    Router,
    Waived,
    hold,
    in_layer,
    random_probe,
    sound,
)
from vl_jax.moe.layer import statistics

UPDATES = 400  # enough for a bias that moves by a thousandth to count
MANY_KEYS = 16  # little noise seldom moves a choice
TRACES = "two fresh traces agree"
SMALL, LARGE = 2e-5, 0.05  # moves of logits: float32 tells the small one, 16 bits do not


def odd_inputs(router: Router) -> None:
    """Decisions, losses and gradients are sound for ties, large logits, one modality and single tokens."""
    logits, context = router.inputs(0)
    first = np.arange(LENGTH) == 0
    cases = {
        "logits that are all equal": (0 * logits, context),
        "large logits": (1e4 * logits, context),
        "one token in a row": (logits, dataclasses.replace(context, valid=context.valid & first)),
    }
    for number, name in enumerate(MODALITIES):
        alone = dataclasses.replace(context, modality=np.full_like(context.modality, number))
        cases[f"nothing but {name}"] = logits, alone
    for name, (values, where) in cases.items():
        found, what = router.decide(values, where), f", with {name}"
        sound(found.assignment, found.losses, where.valid, router.config, what=what)
        of_losses = router.decide(values, where, of_losses=True)
        for of, leaf in (("weights", found.gradient), ("losses", of_losses.gradient)):
            assert np.isfinite(leaf).all(), f"the gradient of the {of}{what} is not finite"


def choices_count(router: Router) -> None:
    """A choice that is used weighs something, at least for some tokens; scores are probabilities."""
    found = router.decide(*router.inputs(0))
    assert found.weights.any(), "no token gets anything from any expert"
    if isinstance(found.assignment, TokenChoice):
        used = found.assignment.experts < router.config.num_experts
        for k in range(used.shape[-1]):
            assert not used[..., k].any() or found.assignment.gates[..., k].any(), (
                f"choice {k + 1} of every token has a gate of 0: it works for nothing; leave it unused"
            )
    scores, shape = found.scores, found.weights.shape
    assert scores.shape == shape, f"Scheme.scores are {scores.shape}, expected {shape}"
    fine = np.isfinite(scores).all() and scores.min() >= 0 and scores.sum(axis=-1).max() <= 1 + 1e-3
    assert fine, "Scheme.scores are no probabilities: from 0, with a sum of at most 1"


def decides_by_its_input(router: Router) -> None:
    """One input gives one decision, traced anew and with more padding; the given state is left alone."""
    config, scheme = router.config, routing.scheme_of(router.config)
    logits, context = router.inputs(0)
    once, again = router.decide(logits, context), router.decide(logits, context)
    with named("one input, one decision"):
        _equal("one input gives two decisions:", again, once)
    longer = router.traced_anew()(*router.inputs(0, length=LENGTH + 4))  # more padding, to compile once
    if not np.allclose(longer.weights[:, :LENGTH], once.weights, atol=1e-5):
        anew = router.traced_anew()(logits, context)
        with named(TRACES):
            _equal("traced again, it decides otherwise (a global, numpy's random, the time?):", anew, once)
        raise AssertionError("a row is routed otherwise if there is more padding after it")
    for name, loss in once.losses.items():
        same = np.allclose(longer.losses[name], loss, rtol=1e-4, atol=1e-6)
        assert same, f"loss {name!r} differs when it is traced again, with more padding"
    with named(TRACES):
        _equal_states("init_state called twice", routing.init_state(config), routing.init_state(config))

    def leaves_alone(logits: jax.Array, context: RoutingContext) -> None:
        given = dict(state := router.state)
        scheme.route(logits, context, given, config)
        changed = [n for n in given.keys() | state.keys() if given.get(n) is not state.get(n)]
        hold(
            "route leaves its state alone",
            not changed,
            f"route writes to its state ({', '.join(changed)}); that is for update_state",
        )

    jax.eval_shape(
        lambda z, where: by_group(leaves_alone, z, in_layer(where, router.params)), logits, context
    )
    single = jax.tree.map(lambda a: a[:1, :1], (logits, context))  # as in decoding
    router.trace(*single)


def rows_are_routed_alone(router: Router) -> None:
    """What is decided for a row depends neither on other rows nor on its place among them."""
    (logits, context), others = router.inputs(0), router.inputs(1)
    before = router.decide(logits, context)
    for rows in ([2, 0, -1, -1], [-1, -1, 1, 3]):
        mixed = [
            jax.tree.map(functools.partial(_rows, rows=rows), a, b)
            for a, b in zip((logits, context), others, strict=True)
        ]
        after = router.decide(*mixed)
        for place, row in enumerate(rows):
            if row >= 0:
                same = np.allclose(after.weights[place], before.weights[row], atol=1e-5)
                assert same, "a row is routed otherwise among other rows"


def _rows(first: np.ndarray, others: np.ndarray, *, rows: list[int]) -> np.ndarray:
    """Some rows of the first array; of the others in places of -1."""
    return np.stack([others[place] if row < 0 else first[row] for place, row in enumerate(rows)])


def router_learns(router: Router) -> None:
    """Where logits decide, the weights have a gradient by them, and it does not point the wrong way."""
    (logits, context), (others, _) = router.inputs(0), router.inputs(1)
    found = router.decide(logits, context)
    changed = router.decide(others, context)
    follows = np.any(changed.chosen != found.chosen, axis=-1) & context.valid
    if not follows.any():  # it mixes, and chooses nothing
        follows = np.any(np.abs(changed.weights - found.weights) > 1e-6, axis=-1) & context.valid
    if not follows.any():
        raise Waived("it does not depend on logits")
    taught = np.linalg.norm(found.gradient, axis=-1) > 1e-6
    assert np.sum(taught & follows) >= follows.sum() / 4, (
        "logits choose the experts, but the output has no gradient by them: the router cannot learn"
    )
    length = np.linalg.norm(found.gradient)
    step = 1e-3 * found.gradient / length
    probe = random_probe(router.config)
    moved = (router.decide(logits + sign * step, context).weights for sign in (1, -1))
    up, down = (np.sum(np.float64(weights) * probe) for weights in moved)
    assert up - down >= -1e-3 * length, "weights fall where their gradient says that they rise"


def higher_logits_choose(router: Router) -> None:
    """Raising the logit of an expert that a token uses neither takes it away nor lowers its weight."""
    if not routing.scheme_of(router.config).by_expert:
        raise Waived("declared by_expert=False")
    logits, context = router.inputs(0)
    before = router.decide(logits, context)
    rows = np.arange(GROUPS)
    for rank in range(2):
        experts = np.argsort(-before.weights, axis=-1)[..., rank]
        probe = (experts[..., None] == np.arange(before.weights.shape[-1])).astype(np.float32)
        taught = np.abs(router.decide(logits, context, probe=probe).gradient).max(axis=-1) > 0
        for t in range(LENGTH):
            mine = rows, np.full(GROUPS, t), experts[:, t]
            used, raised = before.chosen[mine], logits.copy()
            raised[mine] += 0.5
            after = router.decide(raised, context)
            assert (after.chosen[mine] | ~used).all(), "a higher logit takes its expert away from a token"
            risen = np.where(used, after.weights[mine] - before.weights[mine], 0.0)
            assert (risen >= -1e-5).all(), "a higher logit lowers the weight of its expert"
            assert (taught[:, t] | (risen <= 1e-4)).all(), "a weight follows its logit, but has no gradient"
            both = after.chosen[:, t] & before.chosen[:, t] & used[:, None] & (probe[:, t] == 0)
            others = np.where(both, after.weights[:, t] - before.weights[:, t], 0.0)
            assert (others <= 1e-5).all(), "a higher logit raises the weight of another expert"


def losses_teach(router: Router) -> None:
    """Losses that differ between inputs have a gradient; ``balance`` is lower where load is even."""
    logits, context = router.inputs(0)
    found = router.decide(logits, context, of_losses=True)
    others = router.decide(*router.inputs(1)).losses
    differ = [name for name, loss in found.losses.items() if abs(others[name] - loss) > 1e-6]
    assert not differ or found.gradient.any(), f"losses have no gradient by logits: {', '.join(differ)}"
    if "balance" in found.losses and routing.scheme_of(router.config).by_expert:
        crowded = logits.copy()
        crowded[..., : router.config.top_k] += 10
        loss = router.decide(crowded, context).losses["balance"]
        assert loss >= found.losses["balance"] - 1e-6, "the balance loss is lower where few experts take all"


def float32_decides(router: Router) -> None:
    """Weights follow changes of logits that 16 bits do not tell."""
    logits, context = router.inputs(0)
    before = router.decide(logits, context)
    direction = np.random.default_rng(1).standard_normal(logits.shape, np.float32)

    def moved(size: float) -> int:
        after = router.decide(logits + np.float32(size) * direction, context)
        return int(np.sum(np.any(after.weights != before.weights, axis=-1)))

    small, large = moved(SMALL), moved(LARGE)
    assert small >= large / 2, (
        f"a small change of logits moves the weights of {small} tokens, a larger one those of {large}: "
        "scores must be float32"
    )


def every_expert_is_reached(router: Router) -> None:
    """Some input leads to every expert, also after many updates of the state; these keep load even."""
    config = router.config
    decided = [router.decide(*pair) for pair in _pool(router)]
    _reached(decided, "")
    if not routing.scheme_of(config).init_state(config):
        return
    state = _updated(router)
    for name, leaf in state.items():
        what = f"after {UPDATES} updates {name!r} of the state is not finite"
        hold("the state stays finite", np.isfinite(leaf).all(), what)
    after = [router.decide(*pair, state) for pair in _pool(router)]
    _reached(after, f" after {UPDATES} updates of the state")
    loads = (np.sum([d.chosen for d in found], axis=(0, 1, 2)) for found in (decided, after))
    before, now = (float(balance.max_violation(jnp.asarray(load))) for load in loads)
    assert now <= before + 1, (
        f"{UPDATES} updates of the state make load uneven: its highest is {now + 1:.1f} times the mean, it "
        f"was {before + 1:.1f}"
    )


def _reached(decided: list[Decision], when: str) -> None:
    missed = np.flatnonzero(~np.any([d.chosen.any(axis=(0, 1)) for d in decided], axis=0))
    assert not missed.size, f"no token reaches experts {missed.tolist()}{when}"


def _pool(router: Router) -> Iterator[tuple[np.ndarray, RoutingContext]]:
    """So many inputs that an expert is missed by chance in none of a million tries."""
    config = router.config
    for seed in range(4 + math.ceil(40 * config.num_experts / (GROUPS * LENGTH * config.top_k))):
        yield router.inputs(seed)


def _updated(router: Router) -> dict[str, np.ndarray]:
    """The state after many steps on a few inputs in turn."""
    config = router.config
    pool = jax.tree.map(lambda *leaves: np.stack(leaves), *_pool(router))
    size = pool[0].shape[0]

    @jax.jit
    def run(state: Any, pool: Any) -> Any:
        def step(state: Any, number: jax.Array) -> tuple[Any, Any]:
            logits, context = jax.tree.map(lambda a: a[number], pool)
            context = in_layer(context, router.params)
            assignment, _ = routing.route(logits, context, state, config)
            dropped = jnp.zeros((*context.valid.shape, 1), bool)
            stats = statistics(logits, assignment, dropped, context=context, config=config)
            return routing.update_state(state, stats, config), stats

        return jax.lax.scan(step, state, jnp.arange(UPDATES) % size)

    try:
        state, stats = jax.device_get(run(router.state, pool))
    except TypeError as error:
        raise Waived(f"the state does not keep its shapes: {str(error).splitlines()[0]}") from None
    once, again = (
        jax.jit(functools.partial(routing.update_state, config=config))(
            router.state, jax.tree.map(lambda a: a[0], stats)
        )
        for _ in range(2)
    )
    with named(TRACES):
        _equal_states("update_state, traced twice,", once, again)
    return state


def noise_as_declared(router: Router) -> None:
    """Given a key, only a scheme with ``rng=True`` routes otherwise; one key gives one decision."""
    scheme, (logits, context) = routing.scheme_of(router.config), router.inputs(0)
    keys = [jax.random.split(jax.random.key(seed), GROUPS) for seed in range(MANY_KEYS)]
    quiet = router.decide(logits, context)
    if not np.allclose(router.traced_anew()(logits, context).weights, quiet.weights, atol=1e-5):
        raise Waived("traced again, it decides otherwise without any key")
    with_keys = [(logits, dataclasses.replace(context, rng=key)) for key in (*keys, keys[0])]
    decide = router.traced_anew()
    noisy = [decide(*pair) for pair in with_keys]
    _equal("one key gives two decisions:", noisy[-1], noisy[0])
    moved = any(np.any(np.abs(found.weights - quiet.weights) > 1e-6) for found in noisy)
    assert scheme.rng or not moved, "declared rng=False, but a key changes what it decides"
    assert moved or not scheme.rng, "declared rng=True, but it routes in training as in evaluation"
    first = context.valid & (np.arange(GROUPS) < 2)[:, None]
    alone = decide(logits, dataclasses.replace(context, rng=keys[0], valid=first))
    same = np.allclose(alone.weights[:2], noisy[0].weights[:2], atol=1e-5)
    assert same, "in training, a row is routed otherwise among other rows"
    for found in noisy:
        sound(found.assignment, found.losses, context.valid, router.config, what=", in training")


def passes_over_excluded(router: Router) -> None:
    """A token that is denied an expert takes the next best one, whatever the state says for the expert."""
    logits, context = router.inputs(0)
    number, top_k = router.config.num_experts, router.config.top_k
    denied = _denied(router, np.ones(number, bool), router.state)
    assert not denied.weights.any(), "all experts are excluded, and tokens get something from one"
    found = [router.decide(*router.inputs(seed)) for seed in range(3)]
    if not isinstance(denied.assignment, TokenChoice) or any(
        (d.chosen.sum(axis=-1)[context.valid] != min(top_k, number)).any() for d in found
    ):
        return  # their number varies with the token
    for push in (0.0, 2.0, -2.0) if router.state else (0.0,):
        for expert in range(min(number, 8)):
            state = {name: _pushed(leaf, expert, push) for name, leaf in router.state.items()}
            before = router.decide(logits, context, state).chosen
            after = _denied(router, np.arange(number) == expert, state).chosen
            lost = (after.sum(axis=-1) < min(top_k, number - 1)) & context.valid & before[..., expert]
            assert not lost.any(), (
                f"of {lost.sum()} tokens that may not take expert {expert}, none takes the next best instead"
            )


def _denied(router: Router, excluded: np.ndarray, state: dict[str, Any]) -> Decision:
    """What is decided where some experts are excluded for all tokens."""
    logits, context = router.inputs(0)
    found = router.decide(logits, context, {**state, routing.EXCLUDED: excluded[None, None]})
    sound(found.assignment, found.losses, context.valid, router.config, what=", with excluded experts")
    assert not found.weights[..., excluded].any(), "a token gets something from an excluded expert"
    return found


def _pushed(leaf: Any, expert: int, push: float) -> Any:
    """A part of a state in which the number of one expert is changed, if it has one for each."""
    leaf = np.array(leaf)
    if leaf.ndim and np.issubdtype(leaf.dtype, np.floating) and leaf.shape[-1] > expert:
        leaf[..., expert] += np.float32(push)
    return leaf


@contextlib.contextmanager
def named(broken: str) -> Iterator[None]:
    """Gives a property's own name to what does not hold inside."""
    try:
        yield
    except AssertionError as error:
        raise Broken(broken, str(error)) from None


def _equal(what: str, found: Decision, expected: Decision) -> None:
    same = np.allclose(found.weights, expected.weights, atol=1e-6)
    assert same, f"{what} weights differ by up to {np.max(np.abs(found.weights - expected.weights)):.1e}"
    for name, loss in expected.losses.items():
        assert np.allclose(found.losses[name], loss, rtol=1e-5), f"{what} loss {name!r} differs"


def _equal_states(what: str, found: Any, expected: Any) -> None:
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
    assert all(jax.tree.leaves(same)), f"{what} gives two different states"


PROPERTIES: tuple[tuple[str, Callable[[Router], None]], ...] = (
    ("sound on odd inputs", odd_inputs),
    ("choices count", choices_count),
    ("the input alone decides", decides_by_its_input),
    ("rows are routed on their own", rows_are_routed_alone),
    ("the router learns", router_learns),
    ("higher logits choose", higher_logits_choose),
    ("losses teach", losses_teach),
    ("scores are float32", float32_decides),
    ("every expert is reached", every_expert_is_reached),
    ("noise as declared", noise_as_declared),
    ("excluded experts are passed over", passes_over_excluded),
)
