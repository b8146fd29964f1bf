"""Our scores of the cases that kits score, each in the kit's variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kit_cases import Case

from vl_jax.evaluate.metrics.pixels.boxes import first_box, overlap
from vl_jax.evaluate.metrics.text.anls import anls
from vl_jax.evaluate.metrics.text.circular import read_option
from vl_jax.evaluate.metrics.text.ocrbench import holds_reference
from vl_jax.evaluate.metrics.text.relaxed import is_relaxed_match
from vl_jax.evaluate.metrics.text.vqa import vqa_accuracy
from vl_jax.evaluate.metrics.text.yes_no import YesNo


def _each(score: Callable[..., Any], **options: Any) -> Callable[[Sequence[Case]], list[float]]:
    return lambda cases: [float(score(c["references"], c["prediction"], **options)) for c in cases]


def _relaxed(**options: Any) -> Callable[[Sequence[Case]], list[float]]:
    return lambda cases: [
        float(any(is_relaxed_match(r, c["prediction"], **options) for r in c["references"])) for c in cases
    ]


def _pope(reading: Any) -> Callable[[Sequence[Case]], list[float]]:
    def score(cases: Sequence[Case]) -> list[float]:
        metric = YesNo(reading=reading).start()
        for case in cases:
            metric.update(case["references"], case["prediction"])
        found = metric.compute()
        return [found[f"pope_{name}"] for name in ("accuracy", "precision", "recall", "f1")]

    return score


def _ocrbench(**options: Any) -> Callable[[Sequence[Case]], list[float]]:
    return lambda cases: [
        float(holds_reference(c["references"], c["prediction"], formulas=c["formula"], **options))
        for c in cases
    ]


def _box(cases: Sequence[Case]) -> list[float]:
    return [overlap(c["box"], first_box(c["prediction"], reading="lmms_eval"), 0.5)[0] for c in cases]


def _option(reading: Any) -> Callable[[Sequence[Case]], list[float]]:
    return lambda cases: [
        float(read_option(c["prediction"], c["options"], reading=reading) == c["references"][0])
        for c in cases
    ]


OURS: dict[str, Callable[[Sequence[Case]], list[float]]] = {
    "lmms_eval/vqav2": _each(vqa_accuracy, variant="lmms_eval"),
    "lmms_eval/textvqa": _each(vqa_accuracy, variant="evalai"),
    "lmms_eval/docvqa": _each(anls, variant="lmms_eval"),
    "lmms_eval/chartqa": _relaxed(variant="lmms_eval"),
    "lmms_eval/pope": _pope("lmms_eval"),
    "lmms_eval/ocrbench": _ocrbench(variant="lmms_eval"),
    "lmms_eval/refcoco": _box,
    "lmms_eval/mmbench": _option("lmms_eval"),
    "vlmevalkit/vqa": _each(vqa_accuracy, variant="vlmevalkit_2026"),
    "vlmevalkit/docvqa": _each(anls, variant="lmms_eval"),
    "vlmevalkit/chartqa": _relaxed(variant="vlmevalkit"),
    "vlmevalkit/pope": _pope("vlmevalkit"),
    "vlmevalkit/ocrbench": _ocrbench(),
    "vlmevalkit/mmbench": _option("vlmevalkit"),
}
