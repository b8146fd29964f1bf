"""Where the time of a run went, for its page: the parts, their sum, and what came of the devices."""

from __future__ import annotations

from collections.abc import Iterable

from vl_jax.report.charts import absent, percent
from vl_jax.report.tables import Cell, TextTable, to_html
from vl_jax.runtime import spent
from vl_jax.runtime.spent import Account, Line

_NAMES = {
    spent.STEP: ("steps that count", "productive"),
    spent.WASTED: ("steps done again", "since the last checkpoint before a launch ended"),
    spent.DATA: ("waiting for data", "the next batch was not ready"),
    spent.COMPILE: ("compiling", "tracing included, wherever it was needed"),
    spent.CHECKPOINT: ("saving checkpoints", "what held up the steps; writing goes on beside them"),
    spent.RESTORE: ("restoring", "reading the checkpoint that a launch goes on from"),
    spent.EVALUATION: ("evaluation", "while training, and at the end"),
    spent.INITIALISATION: ("initialisation", "until the first step of a stage"),
    spent.REPORT: ("report", "writing this page, and what follows"),
}


def section(lines: Iterable[Line]) -> str:
    """The table of a ledger, and what is said of it."""
    found = spent.account(lines)
    if found is None:
        return absent(f"No {spent.GOODPUT_FILE} yet.")
    return to_html(table(found)) + "".join(f'<p class="note">{line}</p>' for line in remarks(found))


def table(found: Account) -> TextTable:
    """Every kind that took time, the rest, and the whole."""
    rows = []
    for kind in dict.fromkeys((*_NAMES, *found.seconds)):
        name, said = _NAMES.get(kind, (kind, ""))
        if found.seconds[kind] > 0 or kind == spent.STEP:
            if kind == spent.COMPILE:
                said += f"; from the cache {found.hits:,}, anew {found.misses:,}"
            mood = "bad" if kind == spent.WASTED else ""
            rows.append(_row(name, found.seconds[kind], found.wall, said, mood))
    rows.append(_row("not explained", found.remainder, found.wall, "such as a computer that slept"))
    times = f"{found.launches:,} launch{'es' if found.launches > 1 else ''}"
    rows.append(_row("all", found.wall, found.wall, f"by the clock, of {times}"))
    return TextTable(("what", "", "seconds", "share"), rows, left=2)


def remarks(found: Account) -> list[str]:
    """What the table does not hold, a line each."""
    steps = f"{found.steps:,} steps count"
    if found.wasted_steps:
        steps += f", {found.wasted_steps:,} were done again"
    lines = [f"{percent(found.goodput)} of the time went into steps that count (goodput); {steps}."]
    if found.launches > 1:
        lines.append(
            f"Between launches {found.between:,.1f} s went by in which nothing was written, such as the "
            "last moments of a launch that was killed; they are not in the table."
        )
    if found.mfu is not None and found.overall_mfu is not None:
        lines.append(
            f"Model flops utilisation: {percent(found.mfu)} in steps that count, "
            f"{percent(found.overall_mfu)} of all the time. It is three times the forward pass, for the "
            "tokens and tiles that were there, over the peak of the devices in bfloat16."
        )
    return lines


def _row(name: str, seconds: float, wall: float, said: str, mood: str = "") -> list[Cell]:
    share = percent(seconds / wall) if wall > 0 else "–"
    return [Cell(name), Cell(said), Cell(f"{seconds:,.1f}", str(seconds), mood=mood), Cell(share)]
