"""What must hold for every routing scheme, checked on a tiny layer: for a scheme's author, and for the tests.

    for result in check("experiments/my_router.py:my_router"):
        print(result)

A scheme that fails says which property, and how; one that declares itself an exception (``causal=False``,
``equivariant=False``), or a machine with one device, has that property waived.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from vl_jax.batch import MODALITIES
from vl_jax.moe import comparisons, figures, routing
from vl_jax.moe.checks import properties
from vl_jax.moe.checks.advice import ADVICE
from vl_jax.moe.checks.decisions import GROUPS, LENGTH, Broken, Router, Waived, hold, make_inputs, sound
from vl_jax.moe.checks.subject import NO_SHARED, TOLERANCE, Subject, distance, finite, make_subject, same
from vl_jax.moe.layer import OWN
from vl_jax.moe.routing import Malformed, MoEConfig, RoutingStats
from vl_jax.runtime import errors


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on one property of a scheme."""

    property: str
    passed: bool | None  # None: waived
    detail: str = ""

    def __str__(self) -> str:
        verdict = {True: "passed", False: "FAILED", None: "waived"}[self.passed]
        text = f"{verdict}  {self.property}" + (f": {self.detail}" if self.detail else "")
        if self.passed is not False:
            return text
        cause, remedy = ADVICE[self.property]
        return f"{text}; likely: {cause}; remedy: {remedy}"


def small_config(scheme: str) -> MoEConfig:
    """Eight experts, two of them chosen, or one where the scheme insists.

    Raises:
      ValueError: there is no such scheme, or it takes neither; one line.
    """
    try:
        return MoEConfig(scheme, num_experts=8, top_k=2, expert_dim=4, shared=NO_SHARED)
    except ValueError:
        return MoEConfig(scheme, num_experts=8, top_k=1, expert_dim=4, shared=NO_SHARED)


Verify = Callable[[Subject], None]


def check(
    scheme: str,
    config: MoEConfig | None = None,
    *,
    properties: Iterable[tuple[str, Verify]] | None = None,
) -> list[Result]:
    """Checks a scheme; every property gives one result.

    Args:
      scheme: as ``MoEConfig.scheme``: a built-in name, or ``path/to/file.py:name``.
      config: the layer it is tried in, small by default. Its shared experts are left out.
      properties: some of ``PROPERTIES``, which share one compiled layer, and of ``comparisons.COMPARISONS``,
        which compile its parts for every kernel and for several devices; all of them by default.

    Raises:
      ValueError: the scheme cannot be loaded or configured; one line.
    """
    config = dataclasses.replace(config or small_config(scheme), scheme=scheme, shared=NO_SHARED)
    subjects: list[Subject] = []
    first = _verdict("it runs", lambda: subjects.append(_runs(config)))
    if not subjects:
        return [first]
    properties = (*PROPERTIES, *comparisons.COMPARISONS) if properties is None else properties
    results = [first]
    for name, verify in properties:
        found = _verdict(name, functools.partial(verify, *subjects))
        if found.passed is not False or all(
            r.passed is not False or r.property != found.property for r in results
        ):
            results.append(found)  # what fails in several checks is told once
    return results


def _runs(config: MoEConfig) -> Subject:
    """The subject, or what keeps the scheme from running at all, by its name."""
    try:
        return make_subject(config)
    except Malformed as error:
        raise Broken("shapes and dtypes are right", str(error)) from error
    except Exception as error:
        if isinstance(error, KeyError):
            entries = ", ".join(routing.init_state(config)) or "nothing"
            raise Broken("it runs", f"KeyError: {error}; the state has: {entries}") from error
        try:
            make_subject(config, with_key=True)
        except Exception:
            raise error from None
        raise Broken(
            "noise as declared",
            "it runs where there is a key, and fails in evaluation, where context.rng is None",
        ) from error


def _verdict(name: str, verify: Callable[[], None]) -> Result:
    try:
        verify()
    except Waived as reason:
        return Result(name, None, str(reason))
    except Exception as error:  # whatever a scheme does wrong is a finding
        name = error.broken if isinstance(error, Broken) else name
        kind = "" if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: "
        place = errors.place_of(error)  # in the file of the scheme
        where = f"{errors.shown(place[0])}:{place[1]}: " if place else ""
        return Result(name, False, where + kind + " ".join(str(error).split()))
    return Result(name, True)


def well_formed(subject: Subject) -> None:
    """Ids are in range and differ, weights finite and not negative, and unused or masked ones zero."""
    output, c = subject.run(), subject.config
    sound(output.assignment, output.layer.losses, subject.context.valid, c)


def state_keeps_shape(subject: Subject) -> None:
    """``update_state`` gives a finite state of the same names, shapes and dtypes."""
    after = subject.run().state
    shapes = [jax.tree.map(lambda a: (a.shape, str(a.dtype)), s) for s in (subject.state, after)]
    assert shapes[0] == shapes[1], f"the state was {shapes[0]}, after an update it is {shapes[1]}"
    fine = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    hold("the state stays finite", fine, "the state after an update is not finite")


def finite_gradients(subject: Subject) -> None:
    """Gradients are finite, also with large inputs and from the other end of the range."""
    for factor in (1.0, 1e4, 0.0):
        output = subject.run(x=np.float32(factor) * subject.x)
        finite(f"a gradient with the input times {factor:g}", output.gradients)


def parameters_learn(subject: Subject) -> None:
    """Every parameter of the router, and of the scheme's own, has a gradient."""
    config, gradients = subject.config, subject.run().gradients[0]
    if not routing.scheme_of(config).params(subject.x.shape[-1], config):
        raise Waived("it has no parameters of its own")
    for name, leaf in gradients[OWN].items():
        what = f"the scheme's own parameter {name!r} has no gradient: it cannot learn"
        assert np.abs(leaf).max() > 1e-9, what


def equivariance(subject: Subject) -> None:
    """Permuting the tokens of a group permutes their outputs (without noise)."""
    config, scheme = subject.config, routing.scheme_of(subject.config)
    if not scheme.equivariant:
        raise Waived("declared equivariant=False")
    if scheme.causal and not config.is_dropless and config.limit.priority != "gate":
        raise Waived(f"limit.priority={config.limit.priority!r} gives slots by place")
    order = np.random.default_rng(0).permutation(LENGTH)
    before = subject.run(training=False)
    after = subject.run(
        training=False,
        x=subject.x[:, order],
        context=jax.tree.map(lambda a: a[:, order], subject.context),
    )
    same("the output", after.y, before.y[:, order])
    same("the load", after.layer.stats.load, before.layer.stats.load)


def padding_changes_nothing(subject: Subject) -> None:
    """What stands on padding reaches no output, loss, statistic or gradient of a parameter."""
    valid, (x, other) = subject.context.valid, make_inputs(1, subject.config)
    mixed = jax.tree.map(lambda a, b: _either(valid, a, b), subject.context, other)
    before = subject.run()
    x = np.where(valid[..., None], subject.x, 5 * x)
    after = subject.run(x=x, context=dataclasses.replace(mixed, valid=valid))
    assert not before.y[~valid].any(), "padding has an output"
    pairs = {
        "the output": (after.y, before.y),
        "losses or statistics": (after.layer, before.layer),
        "the gradient": (after.gradients[0], before.gradients[0]),
    }
    for what, (a, b) in pairs.items():
        same(f"{what} depends on padding:", a, b)


def _either(first: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a`` for the tokens that are ``first``, ``b`` for the others, whatever each token has."""
    first = np.broadcast_to(first, a.shape[:2])
    return np.where(first[..., None] if a.ndim > 2 else first, a, b)


def only_padding(subject: Subject) -> None:
    """A batch of nothing but padding gives zeros, and finite losses, statistics and gradients."""
    context = dataclasses.replace(subject.context, valid=np.zeros_like(subject.context.valid))
    output = subject.run(context=context)
    assert not output.y.any(), "the output is not zero"
    finite("a loss, statistic or gradient", (output.layer, output.gradients))
    finite("the state after an update", output.state)
    one = np.arange(GROUPS)[:, None] == 0
    output = subject.run(context=dataclasses.replace(context, valid=subject.context.valid & ~one))
    assert not output.y[0].any(), "the output of a row of padding is not zero"
    finite("with one row of padding, a loss, statistic or gradient", (output.layer, output.gradients))


def causality(subject: Subject) -> None:
    """Later tokens change nothing if the scheme is causal, and something if it says it is not."""
    scheme, cut = routing.scheme_of(subject.config), LENGTH // 2
    later, training = np.arange(LENGTH) >= cut, not scheme.foresees
    before, changed = subject.run(training=training), False
    for seed in range(1, 4):
        x, other = make_inputs(seed, subject.config)
        x, context = np.where(later[:, None], 3 * x, subject.x), subject.context
        if context.previous is not None and other.previous is not None:
            context = dataclasses.replace(context, previous=_either(later, other.previous, context.previous))
        if not scheme.rng:  # noise follows token ids
            context = dataclasses.replace(context, tokens=np.where(later, other.tokens, context.tokens))
        if seed == 3 and not scheme.rng:  # that there are any must not matter either
            context = dataclasses.replace(context, valid=context.valid & ~later)
        after = subject.run(training=training, x=x, context=context)
        if scheme.causal:
            same("declared causal, but later tokens matter: the output", after.y[:, :cut], before.y[:, :cut])
        changed = changed or distance(after.y[:, :cut], before.y[:, :cut]) > TOLERANCE
    assert scheme.causal or changed, "declared causal=False, but no later token matters"


def statistics_add_up(subject: Subject) -> None:
    """The statistics of the batch are the sums of those of its halves, and count every valid token.

    Losses are not: that of a whole batch is no sum over its tokens.
    """
    context, first = subject.context, (np.arange(GROUPS) < GROUPS // 2)[:, None]

    def counted(**changes: Any) -> RoutingStats:
        stats = subject.run(**changes).layer.stats
        kept = {name: sums for name, sums in stats.figures.items() if not name.startswith(figures.LOSS)}
        return stats.replace(figures=kept)  # pyright: ignore[reportAttributeAccessIssue]

    halves = [
        counted(context=dataclasses.replace(context, valid=context.valid & rows)) for rows in (first, ~first)
    ]
    whole = counted()
    same("statistics of two halves", jax.tree.map(np.add, *halves), whole)
    assert whole.tokens.sum() == subject.context.valid.sum(), "tokens are miscounted"
    assert whole.load.shape == (len(MODALITIES), subject.config.num_experts)


def _of_router(verify: Callable[[Router], None]) -> Verify:
    return lambda subject: verify(Router(subject.config, subject.state, subject.params.get(OWN, {})))


PROPERTIES: tuple[tuple[str, Verify], ...] = (
    ("ids in range, weights finite, padding unused", well_formed),
    ("state keeps its shapes", state_keeps_shape),
    ("gradients are finite", finite_gradients),
    ("its parameters learn", parameters_learn),
    ("permuted tokens, permuted outputs", equivariance),
    ("padding changes nothing", padding_changes_nothing),
    ("nothing but padding is zero", only_padding),
    ("causal as declared", causality),
    ("statistics of parts add up", statistics_add_up),
    *((name, _of_router(verify)) for name, verify in properties.PROPERTIES),
)
