"""What an ablation declares before anything runs: arms, seeds, budget, and what is claimed of the arms.

    def ablation_balance():
        return Ablation(
            arms=(Arm("auxiliary", {"model.moe.scheme": "top_k"}), Arm("loss_free", {...})),
            claims=(Claim("loss_free", "auxiliary", "eval/heldout/loss", "lower"),),
            equal=("tokens", "flops", "parameters"),
        )

in an experiment file; ``sweep --sweep=balance`` runs it, ``report`` judges it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from vl_jax.schema import ConfigError

Expected = Literal["lower", "higher", "not_lower", "not_higher", "open"]
BUDGETS = ("steps", "samples", "tokens", "parameters", "active_parameters", "flops")
_NAME = re.compile(r"[\w.+-]+")  # what is good in the name of a folder


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the things compared.

    Attributes:
      changes: overrides of the experiment, by dotted path.
      tuning: candidates for what the arm is tuned by, each as overrides on top of ``changes``; the best of
        them on ``Ablation.tuning_seeds`` is what the arm is run with. Empty: those of the ablation.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuning: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"arm {self.name!r}: a name has letters, digits and any of _ . + - only")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is expected of one arm against another, said before they run.

    ``lower`` and ``higher`` are of the metric of ``arm`` minus that of ``baseline``. ``not_higher`` and
    ``not_lower`` are for arms that should lose nothing: the interval has to stay within ``margin``. ``open``
    measures and expects nothing, so it cannot fail.
    """

    arm: str
    baseline: str
    metric: str = ""  # empty: that of the ablation
    expected: Expected = "open"
    margin: float = 0.0  # how much worse still counts as no worse
    says: str = ""  # the claim in words, and who made it

    def __post_init__(self):
        if self.expected not in get_args(Expected):
            known = ", ".join(get_args(Expected))
            raise ValueError(f"{self.name}: expected={self.expected!r} must be one of {known}")
        if self.expected.startswith("not_") != (self.margin > 0):
            raise ValueError(
                f"{self.name}: margin={self.margin} with expected={self.expected!r}: not_higher and "
                "not_lower need a margin > 0, no other has one"
            )

    @property
    def name(self) -> str:
        """Which arms are compared."""
        return f"{self.arm} against {self.baseline}"


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Arms, the seeds that pair their runs, and what is claimed of them."""

    arms: tuple[Arm, ...]
    metric: str  # column of the comparison, such as "heldout: exact_match" or "eval/heldout/loss"
    better: Literal["lower", "higher"]  # which way the metric is better, for tuning and for the marks
    claims: tuple[Claim, ...] = ()
    seeds: int = 8  # runs of every arm; a pair is two arms with one seed
    first_seed: int = 0
    equal: tuple[str, ...] = ("tokens",)  # what all arms must have alike, of BUDGETS
    tolerance: float = 0.01  # as a share, by which it may differ
    tuning: tuple[Mapping[str, Any], ...] = ()  # candidates of every arm that has none of its own
    tuning_seeds: int = 1  # runs of every candidate, with seeds beyond those that are compared
    confidence: float = 0.95
    columns: tuple[str, ...] = ()  # further columns, as patterns
    says: str = ""  # the question in words

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if len(names) < 2 or twice:
            raise ValueError(f"arms {', '.join(names)}: expected two or more, with different names")
        if self.seeds < 1 or self.tuning_seeds < 1 or self.first_seed < 0 or not 0 < self.confidence < 1:
            raise ValueError(
                f"seeds={self.seeds} and tuning_seeds={self.tuning_seeds} must be >= 1, "
                f"first_seed={self.first_seed} >= 0 and confidence={self.confidence} between 0 and 1"
            )
        if self.better not in ("lower", "higher"):
            raise ValueError(f"better={self.better!r} must be lower or higher")
        unknown = next((name for name in self.equal if name not in BUDGETS), None)
        if unknown:
            raise ValueError(f"equal={unknown!r} is no budget; there are {', '.join(BUDGETS)}")
        for claim in self.claims:
            wrong = next((n for n in (claim.arm, claim.baseline) if n not in names), None)
            if wrong is not None or claim.arm == claim.baseline:
                raise ValueError(f"claim {claim.name}: expected two of the arms {', '.join(names)}")
        counts = {arm.name: len(self.candidates(arm)) for arm in self.arms}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise ValueError(f"the tuning budget differs: {said} candidates; give all arms the same number")

    def candidates(self, arm: Arm) -> tuple[Mapping[str, Any], ...]:
        """What an arm is tuned by; one candidate without any change if it is not tuned."""
        return arm.tuning or self.tuning or ({},)

    def metric_of(self, claim: Claim) -> str:
        """The metric that a claim is about."""
        return claim.metric or self.metric


def to_json(plan: Ablation) -> dict[str, Any]:
    """The plan as JSON values; overrides become text, as on a command line."""
    tree = dataclasses.asdict(plan)
    for arm in tree["arms"]:
        arm["changes"] = texts(arm["changes"])
        arm["tuning"] = [texts(changes) for changes in arm["tuning"]]
    tree["tuning"] = [texts(changes) for changes in tree["tuning"]]
    return json.loads(json.dumps(tree))


def from_json(tree: Mapping[str, Any]) -> Ablation:
    """The plan that ``to_json`` wrote.

    Raises:
      ConfigError: a field is missing or breaks a rule.
    """

    def plain(value: Any) -> Any:
        return tuple(plain(v) for v in value) if isinstance(value, list) else value

    try:
        arms = tuple(Arm(**{k: plain(v) for k, v in arm.items()}) for arm in tree["arms"])
        claims = tuple(Claim(**claim) for claim in tree["claims"])
        rest = {k: plain(v) for k, v in tree.items() if k not in ("arms", "claims")}
        return Ablation(arms=arms, claims=claims, **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"plan of an ablation: {error}") from None


def texts(changes: Mapping[str, Any]) -> dict[str, str]:
    """Overrides as text."""
    return {path: str(value) for path, value in changes.items()}


def seeds_of(plan: Ablation) -> Sequence[int]:
    """The seeds that are compared."""
    return range(plan.first_seed, plan.first_seed + plan.seeds)


def tuning_seeds_of(plan: Ablation) -> Sequence[int]:
    """The seeds that candidates are tried with: none of those that are compared, which would favour luck."""
    return range(plan.first_seed + plan.seeds, plan.first_seed + plan.seeds + plan.tuning_seeds)
