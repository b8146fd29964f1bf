"""Results of evaluations as files hold them, and how a score is named and shown, whatever it measures.

    eval/<task>/<step>.json           {"task", "step", "headline": name, "scores": {name: number},
                                       "groups": {kind: {group: {name: number}}}, "shares": [name],
                                       "matrices": [{"title", "rows", "columns", "values", ...}]}
    eval/<task>/<step>.samples.jsonl  a record of every sample

``evaluate/task.py`` says what the names mean. Files of versions that knew one metric only are converted here,
as they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vl_jax.evaluate.metrics.exact_match import is_match
from vl_jax.metrics import read_metrics
from vl_jax.report.charts import number, percent

COUNT = "count"
# The scores of earlier versions, and the fields that they grouped samples by.
_FLAT_SCORES = ("exact_match", "blind_exact_match", "prior_exact_match")
_PARTS = {"headline": str, "scores": dict, "groups": dict, "shares": list}
_AGAIN = "delete it and run again what wrote it, `train` or `evaluate`"
_FLAT_GROUPS = {"by_kind": "kind", "by_language": "language"}


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file, in today's form.

    Raises:
      ValueError: the file is not valid JSON, or a part of it is missing; one line.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold an object; {_AGAIN}")
    if _is_flat(found):
        return _from_flat(found)
    for name, kind in _PARTS.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path}: {name} is missing, or of another kind; {_AGAIN}")
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records beside a result file, in today's form; [] if there are none."""
    records = read_metrics(path.with_suffix(".samples.jsonl"))
    if not _is_flat(read_json(path)):
        return records
    return [
        {**r, "correct": r.get("correct", is_match(r.get("answer") or "", r.get("prediction") or ""))}
        for r in records
    ]


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if there is no file.

    Raises:
      ValueError: it is not valid JSON.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {_AGAIN}") from None


def headline(result: Mapping[str, Any]) -> float | None:
    """The score that is looked at first."""
    return result["scores"].get(result["headline"])


def baselines(result: Mapping[str, Any]) -> dict[str, str]:
    """Scores that the headline is compared with, ``<baseline>_<headline>``, and whose they are."""
    end = f"_{result['headline']}"
    return {name: name.removesuffix(end) for name in result["scores"] if name.endswith(end)}


def label(name: str) -> str:
    """A name in words."""
    return name.replace("_", " ")


def is_share(result: Mapping[str, Any], name: str) -> bool:
    """Whether a score is a share of one."""
    return name in result["shares"]


def show(result: Mapping[str, Any], name: str, value: float | None) -> str:
    """A score as text: a share as a percentage, a count in full."""
    if is_share(result, name):
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def others(result: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of some names of scores that are neither the headline nor the count."""
    return [name for name in names if name not in (result["headline"], COUNT)]


def summary(result: Mapping[str, Any]) -> str:
    """One line: the headline, and all other scores behind it."""
    scores = result["scores"]
    first = f"{label(result['headline'])} {show(result, result['headline'], headline(result))}"
    names = [*others(result, scores), *(name for name in (COUNT,) if name in scores)]
    rest = ", ".join(f"{label(name)} {show(result, name, scores[name])}" for name in names)
    return f"{first} ({rest})" if rest else first


def _is_flat(result: Any) -> bool:
    return isinstance(result, dict) and "scores" not in result


def _from_flat(result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of an earlier version, whose scores stand beside task and step."""
    apart = {"task", "step", "num_questions", *_FLAT_GROUPS}
    scores = {name: value for name, value in result.items() if name not in apart}
    if "num_questions" in result:
        scores[COUNT] = result["num_questions"]
    return {
        **{name: result[name] for name in ("task", "step") if name in result},
        "headline": _FLAT_SCORES[0],
        "scores": scores,
        "groups": {kind: result[field] for field, kind in _FLAT_GROUPS.items() if field in result},
        "shares": list(_FLAT_SCORES),
        "matrices": [],
    }
