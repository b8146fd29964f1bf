"""Keys of records: which are read, what is said of the others, and which was meant by one nearly right.

What changes the meaning of a record is read, or named in a note; what only describes it is passed over.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vl_jax.data.sample import Note

# Keys that say where a record comes from and what it is about, but nothing of what is asked and answered.
_DESCRIPTIVE = frozenset(
    "author category collection conversation_id created created_at data_source dataset date difficulty "
    "domain file_name file_path filename hash idx image_id img_id index key lang language length license "
    "fps meta metadata model name num_turns num_images original_height original_width question_id "
    "question_type answer_type sha256 score size source source_id source_url split subset tag tags task "
    "task_type timestamp title topic type uid unique_id url uuid version height width image_size "
    "duration".split()
)
# Keys that common formats give a meaning that is not followed here, and what is done without it.
_MEANT = {
    "tools": "the model is not told which tools there are",
    "functions": "the model is not told which functions there are",
    "function_call": "the call is not learnt",
    "tool_calls": "the call is not learnt",
    "tool_choice": "the model is not told that it has to call a tool",
    "reasoning_content": "the reasoning is not learnt",
    "thinking": "the reasoning is not learnt",
    "refusal": "the refusal is not learnt",
    "chosen": "preferences are not learnt",
    "rejected": "preferences are not learnt",
    "kto_tag": "preferences are not learnt",
}
_SHOWN = 12  # keys of a record that a message lists
_MAX_WEIGHT = 100.0


def number(value: Any) -> float | None:
    """The number that a value is, or that a text says; None if there is none below a million."""
    found: Any = value
    if isinstance(value, str) and len(value) <= 40:
        try:
            found = float(value)
        except ValueError:
            return None
    if type(found) not in (int, float) or not abs(found) < 1e6:  # NaN is not less
        return None
    return float(found)


def weight_of(holder: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[float, list[Note]]:
    """What an answer counts in the loss: the product of what these keys say; absent or null is 1."""
    weight, notes = 1.0, []
    for name in names:
        value = holder.get(name)
        if value is None:
            continue
        found = float(value) if isinstance(value, bool) else number(value)
        if found is None or not 0 <= found <= _MAX_WEIGHT or not math.isfinite(found):
            rule = f"a weight is a number from 0 to {_MAX_WEIGHT:g}, or true or false"
            notes.append(Note(f"{name}_not_read", f"{where}: {name}={str(value)[:40]!r} counts as 1: {rule}"))
            continue
        weight *= found
    return weight, notes


def unread(holder: Mapping[str, Any], read: Collection[str], where: str) -> list[Note]:
    """What the keys that are not read would have said, where they say something."""
    notes, others = [], []
    for key, value in holder.items():
        if key in read or value is None or value in ("", [], {}):
            continue
        if key in _MEANT:
            notes.append(Note(f"{key}_not_read", f"{where}: {key} is not read: {_MEANT[key]}"))
        elif key.lower() not in _DESCRIPTIVE:
            others.append(key)
    if others:
        names = listed(others)
        notes.append(Note("field_not_read", f"{where}: fields that are not read: {names}"))
    return notes


def listed(keys: Collection[Any]) -> str:
    """Keys as a message lists them."""
    shown = [repr(str(key)[:40]) for key in keys][:_SHOWN]
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(shown) + more if shown else "none"


def meant(record: Mapping[str, Any], wanted: Sequence[str], aliases: Sequence[str] = ()) -> str:
    """Which keys were found, and which of them was perhaps meant; ends of messages about a missing key.

    Args:
      wanted: the keys one of which is missing.
      aliases: what others call the first of them.
    """
    keys = [key for key in record if key not in wanted]
    found = f"found the keys {listed(list(record))}"
    for key in keys:
        if key.lower() in wanted:
            return f"{found}; rename {key[:40]!r} to {key.lower()!r}"
        if key.lower() in aliases:
            return f"{found}; rename {key[:40]!r} to {wanted[0]!r}"
    for key in keys[:1000]:
        near = difflib.get_close_matches(key.lower()[:40], wanted, n=1, cutoff=0.75)
        if near:
            return f"{found}; rename {key[:40]!r} to {near[0]!r}"
    return found
