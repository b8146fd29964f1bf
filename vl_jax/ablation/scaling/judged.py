"""The runs of a grid as points of a curve: their fit, what became of what was expected, and a prediction."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vl_jax.ablation.judgement import HELD, INCOMPLETE, NOT_SHOWN, REVERSED
from vl_jax.ablation.results import Outcome, Results
from vl_jax.ablation.scaling import declared, fit
from vl_jax.ablation.scaling.declared import Expect, Scaling
from vl_jax.ablation.scaling.fit import Estimate, Fit
from vl_jax.runtime.errors import UserError
from vl_jax.schema import ConfigError

NOT_IDENTIFIED = "not identified"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """A point of the grid."""

    arm: str
    at: Mapping[str, float]  # its values, by variable
    flops: float
    losses: tuple[float, ...]  # of its finished runs
    missing: int  # runs that are not finished

    @property
    def mean(self) -> float:
        """The loss that stands for it: the geometric mean, as logarithms are fitted."""
        return math.exp(statistics.fmean(map(math.log, self.losses)))


@dataclasses.dataclass(frozen=True)
class Fulfilment:
    """What became of an expectation."""

    expect: Expect
    estimate: Estimate | None
    word: str

    @property
    def fails(self) -> bool:
        """Whether it did not come true."""
        return self.word != HELD


@dataclasses.dataclass(frozen=True)
class Forecast:
    """How well the cheaper points predict the costliest ones.

    Attributes:
      names: of the points that were held back.
      errors: relative, of what was predicted for each.
      plain: the mean error of the lowest loss of the other points, which is to be beaten.
    """

    names: tuple[str, ...]
    errors: tuple[float, ...]
    plain: float

    @property
    def error(self) -> float:
        """The mean of their sizes."""
        return statistics.fmean(map(abs, self.errors))


@dataclasses.dataclass(frozen=True)
class Curve:
    """All of a scaling curve."""

    scaling: Scaling
    points: tuple[CurvePoint, ...]
    fit: Fit | None
    why_not: str  # why there is no fit
    forecast: Forecast | None
    fulfilments: tuple[Fulfilment, ...]

    @property
    def known(self) -> tuple[CurvePoint, ...]:
        """The points with at least one finished run."""
        return tuple(point for point in self.points if point.losses)


def check(scaling: Scaling, costs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a grid that cannot tell the parameters of its law, before anything runs.

    Raises:
      ConfigError: names the parameters, and how many values each variable has.
    """
    xs = declared.values_of(scaling, costs)
    lost = fit.unidentified(scaling.fitted, xs)
    if lost:
        counts = ", ".join(f"{len(set(values))} of {name}" for name, values in xs.items())
        raise ConfigError(
            f"law {scaling.fitted.name!r}: no losses of this grid can tell {', '.join(lost)} "
            f"({scaling.fitted.equation}; values: {counts}); add points to an axis"
        )


def judge(scaling: Scaling, results: Results) -> Curve:
    """Fits the law to what is finished and judges what was expected.

    Raises:
      UserError: a finished run has no such metric, or its loss is not finite or not above zero.
    """
    points = _points(scaling, results)
    known = [point for point in points if point.losses]
    found, why = _fit(scaling, known)
    is_whole = not any(point.missing for point in points)
    fulfilments = tuple(_fulfilment(expect, found, is_whole) for expect in scaling.expects)
    return Curve(scaling, points, found, why, _forecast(scaling, known), fulfilments)


def _points(scaling: Scaling, results: Results) -> tuple[CurvePoint, ...]:
    costs = results.stored.costs
    xs, points = declared.values_of(scaling, costs), []
    for number, arm in enumerate(scaling.grid):
        outcomes = results.of(arm)
        done = [outcome for outcome in outcomes if outcome.status == "finished"]
        losses = []
        for outcome in done:
            losses.append(_loss(outcome, scaling.metric))
        at = {name: values[number] for name, values in xs.items()}
        missing = len(outcomes) - len(done)
        points.append(CurvePoint(arm, at, float(costs[arm]["flops"]), tuple(losses), missing))
    return tuple(points)


def _loss(outcome: Outcome, metric: str) -> float:
    value = outcome.figures.get(metric)
    if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise UserError(
            f"{outcome.planned.folder}: {metric} is {value}; a law is of finite losses above zero"
        )
    return float(value)


def _columns(scaling: Scaling, points: Sequence[CurvePoint]) -> dict[str, list[float]]:
    return {name: [point.at[name] for point in points] for name in scaling.variables}


def _fit(scaling: Scaling, points: Sequence[CurvePoint], *, resamples: int = 1000) -> tuple[Fit | None, str]:
    needed = len(scaling.fitted.parameters)
    if len(points) < needed:
        return None, f"{len(points)} points are finished, and the law has {needed} parameters"
    losses = [point.mean for point in points]
    columns = _columns(scaling, points)
    return fit.fit(scaling.fitted, columns, losses, confidence=scaling.confidence, resamples=resamples), ""


def _forecast(scaling: Scaling, points: Sequence[CurvePoint]) -> Forecast | None:
    """None if the rest cannot tell the law's parameters."""
    if len(points) < 2:
        return None
    count = max(1, int(scaling.held_back * len(points)))
    least = sorted(point.flops for point in points)[-count]
    rest = [point for point in points if point.flops < least]
    held = [point for point in points if point.flops >= least]
    if len(rest) < len(scaling.fitted.parameters):
        return None
    if fit.unidentified(scaling.fitted, _columns(scaling, rest)):
        return None
    found, _ = _fit(scaling, rest, resamples=2)
    if found is None:
        return None
    truth, lowest = np.array([point.mean for point in held]), min(point.mean for point in rest)
    errors = found.predict(_columns(scaling, held)) / truth - 1
    plain = float(np.mean(np.abs(lowest / truth - 1)))
    return Forecast(tuple(point.arm for point in held), tuple(map(float, errors)), plain)


def _fulfilment(expect: Expect, found: Fit | None, is_whole: bool) -> Fulfilment:
    if found is None or not is_whole:  # runs fail for reasons that have to do with their size
        return Fulfilment(expect, found[expect.parameter] if found else None, INCOMPLETE)
    estimate = found[expect.parameter]
    (low, high), (_, least, most) = expect.bounds, estimate.interval
    if low <= least and most <= high and not estimate.is_lost:
        word = HELD
    elif (most < low or least > high) and not estimate.is_lost:
        word = REVERSED
    else:
        word = NOT_IDENTIFIED if estimate.why_not else NOT_SHOWN
    return Fulfilment(expect, estimate, word)
