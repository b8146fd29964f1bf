"""What a scaling curve declares before anything runs: a grid of runs, a law, and what is expected of it.

    def scaling_size():
        return Scaling(
            axes=(
                Axis("size", {"32": {"model.language.embed_dim": 32}, "48": {...}, "64": {...}}),
                Axis("tokens", {"100": {"stages.train.steps": 100}, "200": {...}, "400": {...}}),
            ),
            expects=(Expect("alpha", low=0.0),),
        )

in an experiment file; ``sweep --sweep=size`` runs it as it runs an ablation, ``report`` fits and judges it.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from vl_jax import parts
from vl_jax.ablation.plan import Ablation, Arm, texts
from vl_jax.ablation.scaling import law as laws
from vl_jax.ablation.scaling.law import Law
from vl_jax.runtime import disk
from vl_jax.schema import ConfigError

SCALING_FILE = "scaling.json"
COUNTED = ("size", "tokens")  # variables whose values are counted, and not taken from names of points
Size = Literal["active_parameters", "parameters", "flops_per_token"]
_NAME = re.compile(r"[\w.+]+")


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a grid.

    Attributes:
      name: the variable that changes along the axis. ``size`` and ``tokens`` are counted for every point; of
        any other, such as ``experts`` or ``granularity``, the names of the points are the values.
      points: overrides of the experiment by the name of the point.
      varies: the variables, if the axis has several, such as size and tokens at equal cost; all counted then.
    """

    name: str
    points: Mapping[str, Mapping[str, Any]]
    varies: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.points:
            raise ValueError(f"axis {self.name!r}: it has no point")
        wrong = next((n for n in (self.name, *self.points) if not _NAME.fullmatch(str(n))), None)
        if wrong is not None:
            raise ValueError(
                f"axis {self.name!r}: {wrong!r} is no name of letters, digits and any of _ . + only"
            )
        unknown = next((n for n in self.varies if n not in COUNTED), None)
        if unknown is not None:
            raise ValueError(f"axis {self.name!r}: varies={unknown!r} must be of {', '.join(COUNTED)}")
        for point in self.points if not self.varies and self.name not in COUNTED else ():
            try:
                sound = 0 < float(point) < math.inf
            except ValueError:
                sound = False
            if not sound:
                raise ValueError(
                    f"axis {self.name!r}: point {point!r} must be its value, a number above zero "
                    f"(only {' and '.join(COUNTED)} are counted)"
                )

    @property
    def variables(self) -> tuple[str, ...]:
        """What changes along the axis."""
        return self.varies or (self.name,)


@dataclasses.dataclass(frozen=True)
class Expect:
    """Between which values a parameter of the law should be, said before the runs.

    It holds if the whole interval of the parameter is between them.
    """

    parameter: str
    low: float | None = None
    high: float | None = None
    says: str = ""  # the claim in words, and who made it

    def __post_init__(self):
        low, high = self.bounds
        if not low < high or (self.low is None and self.high is None):
            raise ValueError(
                f"expected {self.parameter}: low={self.low} and high={self.high}: give one of them, or both "
                "with low < high"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """Both ends, infinite where there is none."""
        return (
            -math.inf if self.low is None else self.low,
            math.inf if self.high is None else self.high,
        )


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A grid of points, each run with some seeds, and the law that is fitted to their losses."""

    axes: tuple[Axis, ...]
    law: str | Law = ""  # a name, or a law of one's own; empty: the one for the variables of the axes
    metric: str = "heldout: loss"  # column of the comparison; above zero and better when lower
    expects: tuple[Expect, ...] = ()
    seeds: int = 3  # runs of every point
    first_seed: int = 0
    size: Size = "active_parameters"  # what the size of a model is counted by
    held_back: float = 0.2  # share of the points, the costliest, that the rest has to predict
    confidence: float = 0.95
    says: str = ""  # the question in words

    def __post_init__(self):
        names = [name for axis in self.axes for name in axis.variables]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not self.axes or twice:
            raise ValueError(f"axes: {f'two vary {twice!r}' if twice else 'there is none'}")
        if self.size not in get_args(Size):
            raise ValueError(f"size={self.size!r} must be one of {', '.join(get_args(Size))}")
        if self.seeds < 1 or self.first_seed < 0:
            raise ValueError(f"seeds={self.seeds} must be >= 1 and first_seed={self.first_seed} >= 0")
        if not (0 < self.confidence < 1 and 0 < self.held_back < 1):
            raise ValueError(
                f"confidence={self.confidence} and held_back={self.held_back} must be between 0 and 1"
            )
        known, points = self.fitted.parameters, len(self.grid)
        unfit = set(self.fitted.variables) ^ set(names)
        if unfit:
            raise ValueError(
                f"law {self.fitted.name!r} is of {', '.join(self.fitted.variables)}, "
                f"but the axes vary {', '.join(names)}"
            )
        if points < len(known):
            raise ValueError(
                f"{points} points are fewer than the {len(known)} parameters of law {self.fitted.name!r} "
                f"({', '.join(known)}); add points to an axis"
            )
        for expect in self.expects:
            if expect.parameter not in known:
                near = parts.near(expect.parameter, known)
                raise ValueError(f"law {self.fitted.name!r} has no parameter {expect.parameter!r}; {near}")

    @property
    def variables(self) -> tuple[str, ...]:
        """What changes over the grid."""
        return tuple(name for axis in self.axes for name in axis.variables)

    @property
    def fitted(self) -> Law:
        """The law that is fitted; ValueError if no law has these variables."""
        return self.law if isinstance(self.law, Law) else laws.find(self.law, self.variables)

    @property
    def grid(self) -> dict[str, tuple[str, ...]]:
        """The point on every axis, by the name of the arm that stands for them."""
        return {
            "-".join(f"{axis.name}{point}" for axis, point in zip(self.axes, points, strict=True)): points
            for points in itertools.product(*(axis.points for axis in self.axes))
        }


def ablation_of(scaling: Scaling) -> Ablation:
    """The runs of a grid, as an ablation whose arms are the points: nothing is equal and nothing claimed.

    Raises:
      ConfigError: the grid has one point only.
    """
    arms = []
    for name, points in scaling.grid.items():
        changes = [axis.points[point] for axis, point in zip(scaling.axes, points, strict=True)]
        both = [path for path in set().union(*changes) if sum(path in c for c in changes) > 1]
        if both:
            raise ConfigError(f"two axes change {min(both)}; one has to")
        arms.append(Arm(name, {path: value for change in changes for path, value in change.items()}))
    try:
        return Ablation(
            tuple(arms),
            scaling.metric,
            "lower",
            seeds=scaling.seeds,
            first_seed=scaling.first_seed,
            equal=(),
            confidence=scaling.confidence,
            says=scaling.says,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def values_of(scaling: Scaling, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """By variable its value at every point of the grid.

    Args:
      costs: of the arms, see ``budget.ArmCost``.
    """
    found: dict[str, list[float]] = {name: [] for name in scaling.variables}
    for arm, points in scaling.grid.items():
        cost = costs[arm]
        tokens = float(cost["tokens"])
        size = cost["flops"] / tokens if scaling.size == "flops_per_token" else cost[scaling.size]
        counted = {"size": float(size), "tokens": tokens}
        for axis, point in zip(scaling.axes, points, strict=True):
            for name in axis.variables:
                found[name].append(counted[name] if name in counted else float(point))
    return found


def to_json(scaling: Scaling) -> dict[str, Any]:
    """A scaling as JSON values; its law in full."""
    tree = {f.name: getattr(scaling, f.name) for f in dataclasses.fields(scaling)}
    tree["axes"] = [
        {
            "name": axis.name,
            "points": {point: texts(changes) for point, changes in axis.points.items()},
            "varies": list(axis.varies),
        }
        for axis in scaling.axes
    ]
    tree["law"] = laws.to_json(scaling.fitted)
    tree["expects"] = [dataclasses.asdict(expect) for expect in scaling.expects]
    return json.loads(json.dumps(tree))


def from_json(tree: Mapping[str, Any]) -> Scaling:
    """The scaling that ``to_json`` wrote.

    Raises:
      ConfigError: a field is missing or breaks a rule.
    """
    try:
        axes = tuple(Axis(a["name"], a["points"], tuple(a["varies"])) for a in tree["axes"])
        expects = tuple(Expect(**expect) for expect in tree["expects"])
        given = {"axes": axes, "expects": expects, "law": laws.from_json(tree["law"])}
        return Scaling(**{**tree, **given})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"plan of a scaling curve: {error}") from None


def is_scaling(folder: Path) -> bool:
    """Whether a folder is one of a scaling curve."""
    return (folder / SCALING_FILE).is_file()


def write(folder: Path, scaling: Scaling, *, finished: int, commit: str) -> None:
    """Writes ``scaling.json``: what is declared, and every declaration there has been before.

    Args:
      finished: runs that were finished when it was declared.
    """
    record = list(read(folder)[1]) if is_scaling(folder) else []
    tree = to_json(scaling)
    known = {name: tree[name] for name in ("law", "metric", "expects", "seeds", "confidence", "size")}
    if not record or any(record[-1].get(name) != value for name, value in known.items()):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record.append({"date": now, "commit": commit, "finished": finished, **known})
    text = json.dumps({"scaling": tree, "declared": record}, indent=1, ensure_ascii=False)
    disk.write_text(folder / SCALING_FILE, text + "\n")


def read(folder: Path) -> tuple[Scaling, Sequence[Mapping[str, Any]]]:
    """What the folder declares, and every declaration there has been.

    Raises:
      ConfigError: the file is damaged.
    """
    path = folder / SCALING_FILE
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return from_json(tree["scaling"]), tree["declared"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); delete it and run `sweep` again") from None
