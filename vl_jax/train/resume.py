"""What may change when a run goes on, and what may not.

A run goes on with another launch of ``train`` in its folder. What the machine decides, how often things
happen and what is evaluated may differ then; the last stage may be longer. All else belongs to the run, and
is refused: its steps would be those of two runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

# Paths of what may change: no step computes anything else by them, but for the order of sums on another mesh
# and for the updates that ``loop.guard`` skips.
MAY_CHANGE = (
    r"name",
    r"loop(\..*)?",
    r"mesh(\..*)?",
    r"evaluation(\..*)?",
    r"data\.root",
    r"data\.loading(\..*)?",
    r"data\.evaluation(\..*)?",
    r"(.*\.)?remat",
    r"(.*\.)?execution(\..*)?",
)
_ABSENT = "absent"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two configurations, one line each: what may, and what must not.

    Args:
      before, now: as parsed from the JSON of a config.
    """
    allowed, refused = [], []
    first, second = flat(before), flat(now)
    for path in [*first, *(path for path in second if path not in first)]:
        old, new = first.get(path, _ABSENT), second.get(path, _ABSENT)
        if old == new:
            continue
        rule = _rule(path, old, new, before)
        if rule is None:
            allowed.append(f"config.{path}: {_shown(old)} before, {_shown(new)} now")
        else:
            refused.append(f"config.{path} is {_shown(old)} there and {_shown(new)} here{rule}")
    return allowed, refused


def _rule(path: str, old: Any, new: Any, before: Mapping[str, Any]) -> str | None:
    """Why a change is refused; None if it is not."""
    if any(re.fullmatch(pattern, path) for pattern in MAY_CHANGE):
        return None
    stage = re.fullmatch(r"stages\.(.*)\.steps", path)
    if stage is None or not isinstance(old, int) or not isinstance(new, int):
        return ""
    if stage[1] != list(before["stages"])[-1]:
        return " (only the last stage can be made longer)"
    return None if new > old else " (it can only grow)"


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted path; of parts with names, which have no class, their order too."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    found = {} if "_type" in tree else {prefix: list(tree)}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found


def _shown(value: Any) -> str:
    text = value if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
