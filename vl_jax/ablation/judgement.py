"""Whether what was declared came true: an effect, its interval, its test and a verdict for every claim.

A difference is shown if two things agree: the exact test over signs, adjusted by Holm's method for all claims
of the ablation, and Student's interval for this claim alone, which excludes zero. The first asks no normal
distribution, the second is what readers look at. A run that failed is not left out quietly: its claim is
incomplete, since runs fail for reasons that have to do with what is compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from vl_jax.ablation.plan import Ablation, Claim, seeds_of
from vl_jax.evaluate import statistics
from vl_jax.evaluate.statistics import Interval

HELD, NOT_SHOWN, REVERSED, INCOMPLETE = "held", "not shown", "reversed", "incomplete"
NO_DIFFERENCE = "no difference shown"
Values = Mapping[str, Mapping[int, float | None]]  # of one metric, by arm and seed


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a claim; figures are not numbers where there is no pair."""

    claim: Claim
    metric: str
    word: str  # one of the words above; of an open claim the direction that was found, or no difference
    effect: Interval  # of the arm minus the baseline
    p: float
    adjusted: float  # the same for one of so many claims
    pairs: int
    missing: tuple[int, ...]  # seeds of which one run is not there
    notes: tuple[str, ...] = ()

    @property
    def fails(self) -> bool:
        """Whether something was declared and did not come true."""
        return self.claim.expected != "open" and self.word != HELD


def judge(plan: Ablation, values: Mapping[str, Values]) -> list[Verdict]:
    """A verdict for every claim.

    Args:
      values: by metric, arm and seed; None, or nothing, where a run did not get so far.
    """
    found = [_differences(plan, claim, values.get(plan.metric_of(claim), {})) for claim in plan.claims]
    tests = [_p(claim, known) for claim, (known, _) in zip(plan.claims, found, strict=True)]
    adjusted, verdicts = statistics.holm(tests), []
    for claim, (known, missing), p, of_many in zip(plan.claims, found, tests, adjusted, strict=True):
        if known:
            effect = statistics.t_interval(known, confidence=plan.confidence)
        else:
            effect = Interval(np.nan, -np.inf, np.inf)
        metric = plan.metric_of(claim)
        word = _word(plan, claim, effect, of_many, bool(missing))
        notes = _notes(plan, claim, known, missing, values.get(metric, {}))
        verdicts.append(Verdict(claim, metric, word, effect, p, of_many, len(known), tuple(missing), notes))
    return verdicts


def _differences(plan: Ablation, claim: Claim, values: Values) -> tuple[list[float], list[int]]:
    """Arm minus baseline for every seed that both have, and the seeds that one of them lacks."""
    arms = values.get(claim.arm, {}), values.get(claim.baseline, {})
    known, missing = [], []
    for seed in seeds_of(plan):
        first, second = (arm.get(seed) for arm in arms)
        if first is None or second is None or not np.isfinite([first, second]).all():
            missing.append(seed)
        else:
            known.append(first - second)
    return known, missing


def _p(claim: Claim, differences: Sequence[float]) -> float:
    """Of no difference; of claims with a margin, of a difference as large as the margin."""
    if not differences:
        return 1.0
    if not claim.margin:
        return statistics.sign_flip_test(differences)
    sign = 1 if claim.expected == "not_higher" else -1
    shifted = sign * np.array(differences) - claim.margin
    return statistics.sign_flip_test(shifted) if shifted.mean() < 0 else 1.0


def _word(plan: Ablation, claim: Claim, effect: Interval, adjusted: float, is_missing: bool) -> str:
    found = "lower" if effect.estimate < 0 else "higher"
    if claim.margin:
        clear = effect.high < claim.margin if claim.expected == "not_higher" else effect.low > -claim.margin
    else:
        clear = effect.low > 0 or effect.high < 0
    shown = clear and adjusted <= 1 - plan.confidence + 1e-12
    if is_missing and (claim.expected != "open" or not np.isfinite(effect.estimate)):
        return INCOMPLETE
    if claim.margin:
        return HELD if shown else NOT_SHOWN
    if claim.expected == "open":
        return found if shown else NO_DIFFERENCE
    if not shown:
        return NOT_SHOWN
    return HELD if found == claim.expected else REVERSED


def _notes(
    plan: Ablation, claim: Claim, differences: Sequence[float], missing: Sequence[int], values: Values
) -> tuple[str, ...]:
    """What a reader has to know besides."""
    notes, pairs = [], len(differences)
    if missing:
        notes.append(f"no pair for seed {', '.join(map(str, missing))}")
    needed = next(n for n in range(1, 64) if _smallest(n, len(plan.claims)) <= 1 - plan.confidence + 1e-12)
    if pairs < needed:
        notes.append(f"{pairs} pairs cannot show a difference among {len(plan.claims)} claims; {needed} can")
    for arm in (claim.arm, claim.baseline):
        known = [v for v in values.get(arm, {}).values() if v is not None]
        if len(known) > 2 and len(set(known)) == 1:
            notes.append(f"every seed of {arm} gives the same figure: the seed reaches nothing that matters")
    return tuple(notes)


def _smallest(pairs: int, claims: int) -> float:
    return claims * statistics.smallest_p(pairs)
