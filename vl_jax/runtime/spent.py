"""Where the time of a run went: its ledger, ``goodput.jsonl``, and what follows from it.

    {"launch": 1, "began": 1764500000.0, "time": 1764500001.5, "peak": 3.67e15}
    {"launch": 1, "time": 1764500031.5, "step": 0, "seconds": {"initialisation": 9.1, "compile": 20.9}, ...}
    {"launch": 1, "time": 1764500061.5, "step": 250, "seconds": {"step": 29.8, "data": 0.2}, "flops": 8.1e15}

Every line tells of the time since the line before, and of the steps in between. A run that is launched again
adds lines; from which step it goes on says which steps before were for nothing. Only whole lines count, so a
file that was cut anywhere can be read. Nothing here knows of models or devices.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

GOODPUT_FILE = "goodput.jsonl"
INITIALISATION, RESTORE, COMPILE, DATA = "initialisation", "restore", "compile", "data"
STEP, CHECKPOINT, EVALUATION, REPORT = "step", "checkpoint", "evaluation", "report"
KINDS = (STEP, INITIALISATION, RESTORE, COMPILE, DATA, CHECKPOINT, EVALUATION, REPORT)
WASTED = "wasted"  # steps, and waiting for their data, that a later launch did again
_REPEATED = (STEP, DATA)
Line = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Account:
    """All launches of a run together."""

    launches: int
    wall: float  # seconds by the clock, from the beginning of each launch to its last line
    seconds: Mapping[str, float]  # by kind, every one of ``KINDS`` and ``WASTED``
    between: float  # seconds from the last line of a launch to the beginning of the next
    steps: int  # that count
    wasted_steps: int
    hits: int  # compilations that the cache spared
    misses: int
    flops: float | None  # of the steps that count, what the model needs; None: not known of all of them
    at_peak: tuple[float, float] | None  # what devices could do in these steps, and in all; None: not known

    @property
    def remainder(self) -> float:
        """Seconds of the wall that no kind explains, such as those of a computer that slept."""
        return self.wall - sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall that went into steps that count."""
        return self.seconds[STEP] / self.wall if self.wall > 0 else 0.0

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the steps that count have used; None where it is not known."""
        return self._share(0)

    @property
    def overall_mfu(self) -> float | None:
        """The same of the whole wall."""
        return self._share(1)

    def _share(self, of: int) -> float | None:
        if self.flops is None or self.at_peak is None or self.at_peak[of] <= 0:
            return None
        return self.flops / self.at_peak[of]


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ledger, in order; [] if there is no file. What is no JSON object is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if isinstance(parsed, dict) and "launch" in parsed and "time" in parsed:
            found.append(parsed)
    return found


def account(lines: Iterable[Line]) -> Account | None:
    """What the lines of a ledger come to; None if there is no line."""
    launches = [list(group) for _, group in itertools.groupby(lines, key=lambda line: line["launch"])]
    if not launches:
        return None
    seconds, counts, flops = Counter[str](), Counter[str](), Counter[bool]()
    wall = between = 0.0
    at_peak: list[tuple[float, float] | None] = []
    for number, launch in enumerate(launches):
        lasted, in_steps = launch[-1]["time"] - _began(launch), seconds[STEP]
        wall += lasted
        if number:
            between += _began(launch) - launches[number - 1][-1]["time"]
        kept = _goes_on_from(launches[number + 1 :])
        for before, line in _steps_before(launch):
            lost = _share_lost(before, line.get("step"), kept)
            for kind, spent in line.get("seconds", {}).items():
                share = lost if kind in _REPEATED else 0.0
                seconds[WASTED] += share * spent
                seconds[kind] += (1 - share) * spent
            counts.update({name: line.get(name, 0) for name in ("hits", "misses")})
            done = 0 if before is None else max(0, line.get("step", before) - before)
            counts.update({"lost": round(lost * done), "kept": done - round(lost * done)})
            flops["flops" in line] += (1 - lost) * line.get("flops", done)
        peak = launch[0].get("peak")
        at_peak.append(None if peak is None else (peak * (seconds[STEP] - in_steps), peak * lasted))
    known = [one for one in at_peak if one is not None]
    return Account(
        launches=len(launches),
        wall=wall,
        seconds={kind: seconds[kind] for kind in dict.fromkeys((*KINDS, WASTED, *seconds))},
        between=between,
        steps=counts["kept"],
        wasted_steps=counts["lost"],
        hits=counts["hits"],
        misses=counts["misses"],
        flops=flops[True] if not flops[False] else None,
        at_peak=(sum(a for a, _ in known), sum(b for _, b in known)) if len(known) == len(at_peak) else None,
    )


def _began(launch: Sequence[Line]) -> float:
    return launch[0].get("began", launch[0]["time"])


def _steps_before(launch: Sequence[Line]) -> Iterable[tuple[int | None, Line]]:
    """Every line, and the step that the launch had done before it; None while it knew of none."""
    step = None
    for line in launch:
        yield step, line
        step = line.get("step", step)


def _goes_on_from(later: Iterable[Sequence[Line]]) -> float:
    """The earliest step from which one of some launches goes on; infinity if none does."""
    steps = (line["step"] for launch in later for line in launch if line.get("step") is not None)
    return min(steps, default=float("inf"))


def _share_lost(before: int | None, step: int | None, kept: float) -> float:
    """Which share of the steps of a line was for nothing, if only those up to ``kept`` count.

    A line during which no step has ended is about the next one.
    """
    if before is None or step is None or kept >= max(step, before + 1):
        return 0.0
    return min(1.0, (step - kept) / (step - before)) if step > before else 1.0
