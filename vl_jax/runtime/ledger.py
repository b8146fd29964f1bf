"""Writing the ledger of a run: at every moment its time belongs to one kind; see ``spent``.

    ledger.turn(STEP)                   from here on, until the next turn
    with ledger.spend(DATA): ...        and back to what it was
    ledger.done(step, flops)            a step has ended

What the compiler takes is taken from the kind during which it runs; ``jax.monitoring`` says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from vl_jax.runtime.spent import COMPILE, GOODPUT_FILE, INITIALISATION, read_ledger

logger = logging.getLogger(__name__)

EVERY_S = 15.0  # seconds between lines, at least
_COMPILES = "/jax/core/compile/"  # tracing, lowering and compiling, one within the other
_CACHE = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
Clock = Callable[[], float]


class Ledger:
    """The ledger of one launch; to be used as a context, in the thread that trains.

    A file that cannot be written ends no run: then no more lines are.
    """

    def __init__(
        self,
        workdir: Path | None = None,
        *,
        began: float | None = None,
        peak: float | None = None,
        now: Clock = time.perf_counter,
        clock: Clock = time.time,
    ):
        """Begins with initialisation.

        Args:
          workdir: of the run; None: nothing is written, as in all processes but one.
          began: when the launch did, in seconds since the epoch; None: now.
          peak: operations a second of all devices at best; None: not known.
          now: a clock that never goes back.
          clock: seconds since the epoch.
        """
        self.peak, self._now, self._clock = peak, now, clock
        self._path = None if workdir is None else workdir / GOODPUT_FILE
        here = clock()
        self._began = here if began is None else began
        self._kind, self._since = INITIALISATION, now() - max(0.0, here - self._began)
        self._step: int | None = None
        self._seconds, self._counts = defaultdict[str, float](float), Counter[str]()
        self._flops: float | None = 0.0
        self._compiling: list[tuple[float, float]] = []  # stretches of the present kind, apart from another
        self._written, self._thread, self._launch = now(), threading.get_ident(), 1
        self._file: Any = None

    def __enter__(self) -> Ledger:
        if self._path is not None:
            with self._told():
                whole = self._path.read_bytes().rpartition(b"\n") if self._path.exists() else (b"", b"", b"")
                self._file = self._path.open("ab", buffering=0)
                os.truncate(self._path, len(whole[0] + whole[1]))  # a line that a crash has cut
                self._launch += max((line["launch"] for line in read_ledger(self._path)), default=0)
        self._append({"began": self._began, "time": self._clock(), "peak": self.peak})
        jax.monitoring.register_event_duration_secs_listener(self._lasted)
        jax.monitoring.register_event_listener(self._counted)
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        jax.monitoring.unregister_event_duration_listener(self._lasted)
        jax.monitoring.unregister_event_listener(self._counted)
        if self._file is not None:
            self._file.close()

    def turn(self, kind: str) -> None:
        """From here on the time is of this kind."""
        now = self._now()
        compiling = sum(end - max(start, self._since) for start, end in self._compiling if end > self._since)
        self._seconds[COMPILE] += compiling
        self._seconds[self._kind] += now - self._since - compiling
        self._kind, self._since, self._compiling = kind, now, []

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Around what takes time of a kind."""
        before = self._kind
        self.turn(kind)
        try:
            yield
        finally:
            self.turn(before)

    def goes_on_from(self, step: int) -> None:
        """Says after which step the launch begins; what later launches begin after says what was wasted."""
        self._step = step
        self.write()

    def done(self, step: int, flops: float | None) -> None:
        """Says that a step has ended, and what the model needed for it; None: not known."""
        self._step = step
        self._flops = None if flops is None or self._flops is None else self._flops + flops
        self.beat()

    def beat(self) -> None:
        """Writes a line if the last one was long ago."""
        if self._now() - self._written >= EVERY_S:
            self.write()

    def write(self) -> None:
        """Writes a line about the time since the last one, on its way to disk when this returns."""
        self.turn(self._kind)
        line: dict[str, Any] = {"time": self._clock()}
        line |= {} if self._step is None else {"step": self._step}
        line["seconds"] = {kind: round(spent, 6) for kind, spent in self._seconds.items() if spent > 0}
        line |= {name: count for name, count in self._counts.items() if count}
        line |= {} if self._flops is None else {"flops": self._flops}
        self._append(line)
        self._seconds.clear()
        self._counts.clear()
        self._flops, self._written = 0.0, self._now()

    def _append(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        with self._told():
            self._file.write(json.dumps({"launch": self._launch, **line}).encode() + b"\n")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Around using the file: what fails there is said once, and ends the writing."""
        try:
            yield
        except OSError as error:
            logger.warning("no more lines in %s: %s", self._path, error.strerror)
            if self._file is not None:
                self._file.close()
            self._file = None

    def _lasted(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILES) and threading.get_ident() == self._thread:
            end = self._now()
            start = end - duration_secs
            # What lies within this stretch ended before it.
            self._compiling = [one for one in self._compiling if one[1] <= start]
            self._compiling.append((start, end))

    def _counted(self, event: str, **kwargs: str | int) -> None:
        if event in _CACHE:
            self._counts[_CACHE[event]] += 1
